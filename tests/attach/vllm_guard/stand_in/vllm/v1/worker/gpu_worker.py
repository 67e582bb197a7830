"""A stand-in: a worker whose model has one GDN layer and one MoE layer."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import get_dp_group
from vllm.v1.worker import dp_utils


class Layer:
    """Of the model, with the attributes that vLLM's have."""

    prefix = "model.layers.0.linear_attn"
    layer_name = "model.layers.0.mlp.experts"


class Worker:
    def __init__(self, vllm_config, folder):
        self.vllm_config, self.folder, self.steps = vllm_config, Path(folder), 0
        self.rank, self.size = (
            vllm_config.parallel_config.data_parallel_rank,
            vllm_config.parallel_config.data_parallel_size,
        )
        self.fault = os.environ.get("STAND_IN_FAULT", "")

    def init_device(self):
        serves, place = self.rank == 0, self.folder / "port"
        while not serves and not place.exists():
            time.sleep(0.01)
        port = 0 if serves else int(place.read_text())  # the system chooses it, so that no other process can have it
        store = dist.TCPStore("127.0.0.1", port, self.size, serves, timedelta(seconds=60), wait_for_workers=False)
        if serves:
            (self.folder / "port.partial").write_text(str(store.port))
            (self.folder / "port.partial").rename(place)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        get_dp_group()

    def load_model(self):
        self.model_runner = None

    def determine_available_memory(self):
        return 0

    def compile_or_warm_up_model(self):
        return 0

    def execute_model(self, scheduler_output):
        return self._run(scheduler_output.total_num_scheduled_tokens)

    def execute_dummy_batch(self):
        return self._run(1)

    def _run(self, num_tokens):
        self.steps += 1
        here = self.rank == 1 and self.steps == 9
        rows = dp_utils._run_ar(num_tokens, self.rank, self.size)
        if here and self.fault == "killed":
            (self.folder / "killed").write_text(repr(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.fault == "raises":
            raise RuntimeError("no memory")
        if here and self.fault == "extra":
            dp_utils._run_ar(num_tokens, self.rank, self.size)
        group = get_dp_group()
        gathered = group.all_gatherv(torch.ones(num_tokens if num_tokens > 1 else 1, 2)[:1])
        group.reduce_scatterv(gathered.clone())
        return rows.tolist(), float(gathered.sum())
