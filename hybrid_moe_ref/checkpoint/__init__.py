"""Checkpoints in Hugging Face's format: a folder with config.json and safetensors files.

    config, saved_dtype = read_config(folder)
    model = HybridMoE(config, device="meta")     # here you can cut the experts to this rank's share
    load_weights(model, folder)

`HybridMoE.from_pretrained` does all of this in one call, and `save_pretrained` writes such a folder. Files are
untrusted input: this package checks their sizes before it allocates memory for them, and executes nothing in them.
"""

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.checkpoint.families import read_config, read_stop_ids
from hybrid_moe_ref.checkpoint.load import describe, load_weights, with_mtp_of
from hybrid_moe_ref.checkpoint.save import save
from hybrid_moe_ref.checkpoint.shards import Shards

__all__ = [
    "CheckpointError",
    "Shards",
    "describe",
    "load_weights",
    "read_config",
    "read_stop_ids",
    "save",
    "with_mtp_of",
]
