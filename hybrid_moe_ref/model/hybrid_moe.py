"""The hybrid language model: embedding, blocks of a token mixer and an MLP, final norm, head.

    config = preset("tiny")
    model = HybridMoE(config, device="meta").init_weights(seed=0)
    logits_BTV = model(tokens_BT)
    new_tokens_BT = model.generate(tokens_BT, max_new_tokens=16)

Parameters have the names of Hugging Face checkpoints. They require no gradient until `model.requires_grad_()`; then
`backward` works, with plain torch kernels.

A kernel can do the work of several submodules, and the model then does not call these submodules. But a submodule that
has a hook, or is wrapped or replaced, is always called. A module that replaces a convolution needs a `weight`, because
the model reads the shape of the weight.

Shapes: B sequences, T tokens of each, N tokens of a step, H hidden, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from hybrid_moe_kernels import registry
from hybrid_moe_kernels.checks import values_known
from torch import Tensor, nn

from hybrid_moe_ref import checkpoint
from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache
from hybrid_moe_ref.config import DTYPES, InputError, ModelConfig
from hybrid_moe_ref.generation import greedy
from hybrid_moe_ref.layers.linear import project
from hybrid_moe_ref.layers.norm import RMSNorm
from hybrid_moe_ref.model.block import Block
from hybrid_moe_ref.model.mtp import MTP, draft_config
from hybrid_moe_ref.model.weights import init_weights
from hybrid_moe_ref.slices import Slice


class Stack(nn.Module):
    """The model without its head: embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # An Embedding with a given weight skips normal_(), which on the meta device imports the compiler: 1.4 s.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            Block(config, kind, f"layers.{index}") for index, kind in enumerate(config.layer_pattern)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class HybridMoE(nn.Module):
    """The language model. Parameters are uninitialised until `init_weights` or a checkpoint fills them.

    slices    a dict from the name of a parameter to the part that this model holds, if it does not hold the whole
    stop_ids  tokens that end a text, the checkpoint's eos_token_id; generation stops at them
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.slices: dict[str, Slice] = {}
        self.stop_ids: tuple[int, ...] = ()
        with torch.device("meta"):
            self.model = Stack(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.num_mtp_layers:
                self.mtp = MTP(config)
        self.to(dtype)
        self.requires_grad_(False)
        self.materialise(device or torch.get_default_device())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        cut: Callable[[Self], object] = lambda model: None,
    ) -> Self:
        """Load a checkpoint folder in Hugging Face's format.

        dtype  dtype of the parameters; None: the dtype in which the checkpoint was saved
        cut    called with the model before its weights are read; parts of the model that it removes are not read.
               To load one rank's part, use `parallel.sharding.layout.load_part`

        Raises CheckpointError with every problem of the folder, InputError for a device that cannot compute in `dtype`.
        """
        config, saved_dtype = checkpoint.read_config(folder)
        if dtype is None:
            if saved_dtype not in (None, *DTYPES):
                raise checkpoint.CheckpointError(f"{folder}/config.json: dtype: {saved_dtype!r} is not one of {DTYPES}")
            dtype = getattr(torch, saved_dtype or "float32")
        check_device(device, dtype)
        shards = checkpoint.Shards(Path(folder))
        model = cls(checkpoint.with_mtp_of(config, shards), device="meta", dtype=dtype)
        cut(model)
        checkpoint.load_weights(model, shards, device)
        model.stop_ids = checkpoint.read_stop_ids(folder)
        return model

    def save_pretrained(self, folder: str | Path, *, family: str | None = None) -> None:
        """Write a checkpoint folder.

        `from_pretrained` can load it, and so can transformers if it implements the layers of the model.

        family: the model type to save as; None: the type that fits the model's layers

        Raises CheckpointError if the model does not fit the family or holds only a part of its parameters, and OSError
        if a file cannot be written.
        """
        checkpoint.save(self, folder, family=family)

    def materialise(self, device: torch.device | str) -> None:
        """Allocate uninitialised memory on `device` for all parameters."""
        if torch.device(device).type != "meta":
            # Not to_empty: its empty_like of a meta tensor imports the compiler's symbolic shapes, 0.4 s.
            self._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> list[Block]:
        """Return the layers in order."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    @property
    def draft_blocks(self) -> list[Block]:
        """Return the layers of the MTP module; [] if there is none."""
        layers = self.mtp.layers if self.config.num_mtp_layers else ()
        return [block for block in layers if isinstance(block, Block)]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def init_weights(self, seed: int, device: torch.device | str = "cpu") -> Self:
        """Fill the parameters with seeded random weights, which do not depend on how the experts are sharded.

        device: the device for parameters that are on the meta device
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            self.materialise(device)
        init_weights(self, seed)
        return self

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] of B whole sequences of T tokens, without a cache. V is the vocabulary size."""
        B, T = _sizes(tokens_BT)
        if not tokens_BT.is_meta:
            self.check_tokens(tokens_BT)
        hidden_NH = self.step(tokens_BT.flatten().to(self.device), Batch.dense(B, T, self.device))
        return self.logits(hidden_NH).unflatten(0, (B, T))

    def step(self, tokens_N: Tensor, batch: Batch, cache: HybridCache | None = None) -> Tensor:
        """Run the layers over the tokens of a batch, and add the tokens to the cache, if there is one.

        Returns the hidden states [N, H] of the N tokens, for `logits`.

        Raises ValueError for a batch or cache that does not fit, CacheExhausted if the cache has too few pages.
        """
        if tokens_N.shape != (batch.num_tokens,):
            raise ValueError(
                f"the batch has {batch.num_tokens} tokens, but the tokens have shape {tuple(tokens_N.shape)}"
            )
        self._check_on_cpu(tokens_N)
        if cache is None and batch.sequences:
            raise ValueError("the batch has cached sequences, but the step was given no cache")
        if cache is not None:
            cache.check_model(self.config, self.dtype)
        pasts = cache.begin(batch) if cache is not None else None
        x_NH = self.model.embed_tokens(tokens_N)
        with registry.trusted(), values_known():  # slots and row counts come from the cache and the batch
            for index, block in enumerate(self.blocks):
                x_NH = block(x_NH, batch, pasts[index] if pasts is not None else None)
        if cache is not None:
            cache.commit(batch)
        return self.model.norm(x_NH)

    def draft(self, tokens_N: Tensor, hidden_NH: Tensor, batch: Batch, cache: HybridCache | None = None) -> Tensor:
        """Run the MTP layer. Returns hidden states [N, H], from which `logits` predicts the tokens after `tokens_N`.

        tokens_N   the token that follows the position of each row
        hidden_NH  for the first draft, the model's hidden state at the position of each row; for later drafts, the
                   result of the previous draft
        cache      a cache from `draft_cache`, to which the rows are added; None: the rows are not cached
        """
        if cache is not None:
            cache.check_model(draft_config(self.config), self.dtype)
        pasts = cache.begin(batch) if cache is not None else None
        with registry.trusted(), values_known():
            hidden_NH = self.mtp(self.model.embed_tokens(tokens_N), hidden_NH, batch, pasts)
        if cache is not None:
            cache.commit(batch)
        return hidden_NH

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits [..., vocabulary size] of hidden states [..., hidden size]."""
        (logits_NV,) = project(hidden_NH.view(-1, hidden_NH.shape[-1]), self.lm_head)
        return logits_NV.view(*hidden_NH.shape[:-1], logits_NV.shape[-1])

    def generate(self, prompts: Tensor | list[Tensor], max_new_tokens: int, **options: Any) -> Tensor:
        """Decode greedily. Returns the new tokens [B, at most max_new_tokens], without the prompts.

        After a token of `stop_ids`, a row repeats that token until all rows have ended.

        prompts  [B, T], or a list of B prompts of any lengths
        options  options of `generation.greedy.stream`, which yields each token as soon as the model has chosen it
        """
        return torch.stack(list(greedy.stream(self, prompts, max_new_tokens, **options)), dim=1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError for an id that is outside the vocabulary.

        Call this before you send tokens to a GPU: `step` checks only tokens on the CPU, because a check on a GPU would
        wait for the GPU.
        """
        check_token_ids(tokens, self.config.vocab_size)

    def _check_on_cpu(self, tokens_N: Tensor) -> None:
        if tokens_N.is_cpu:
            self.check_tokens(tokens_N)


def check_token_ids(tokens: Tensor, vocab_size: int) -> None:
    """Raise InputError if tokens are not integers, or if an id is below 0 or not below `vocab_size`."""
    if tokens.numel():
        if tokens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"token ids have dtype {tokens.dtype}, but must be torch.int64 or torch.int32")
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def _sizes(tokens_BT: Tensor) -> tuple[int, int]:
    if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
        raise ValueError(
            f"tokens must have shape [B, T] with B and T at least 1, but have shape {tuple(tokens_BT.shape)}"
        )
    B, T = tokens_BT.shape
    return B, T


def check_device(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise InputError for a device that is missing or cannot compute in `dtype`."""
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    try:
        x = torch.ones(1, 1, dtype=dtype, device=device)
        F.linear(x, x)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot compute in {dtype} on device {device}: {reason}") from None
    if x.is_meta:
        raise InputError(f"device {device} is not supported: choose cpu or cuda")
