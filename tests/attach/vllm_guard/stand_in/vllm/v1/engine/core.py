"""A stand-in: an engine with vLLM's loop, waves left out."""

import json
import os
import queue
import types
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from vllm.config.parallel import ParallelConfig
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

NUM_STEPS = 40


class EngineCoreProc:
    ENGINE_CORE_DEAD = b"ENGINE_CORE_DEAD"

    def __init__(self, vllm_config, folder):
        self.vllm_config, self.folder = vllm_config, Path(folder)
        self.output_queue = queue.Queue()
        self._init_data_parallel(vllm_config)
        self.model_executor = MultiprocExecutor(vllm_config, folder)

    def _process_input_queue(self):
        pass

    def _send_engine_dead(self):
        self.output_queue.put_nowait(self.ENGINE_CORE_DEAD)

    def shutdown(self):
        self.model_executor.end()


class DPEngineCoreProc(EngineCoreProc):
    def _init_data_parallel(self, vllm_config):
        self.step_counter = 0
        self.dp_rank = vllm_config.parallel_config.data_parallel_rank
        store = dist.FileStore(str(self.folder / "engines"), vllm_config.parallel_config.data_parallel_size)
        size = vllm_config.parallel_config.data_parallel_size
        self.dp_group = dist.ProcessGroupGloo(store, self.dp_rank, size, timedelta(seconds=60))  # no default group

    def run(self):
        outputs = []
        for step in range(NUM_STEPS):
            if self.dp_rank == 1 or step < 5:
                outputs.append(self.model_executor.execute_model(types.SimpleNamespace(total_num_scheduled_tokens=2)))
            elif not (os.environ.get("STAND_IN_FAULT") == "skipped" and step == 12):
                outputs.append(self.model_executor.execute_dummy_batch())
            if os.environ.get("STAND_IN_FAULT") == "engine" and (self.dp_rank, step) == (1, 8):
                raise ValueError("no such request")
            self._has_global_unfinished_reqs(step + 1 < NUM_STEPS)
        (self.folder / f"outputs{self.dp_rank}.json").write_text(json.dumps(outputs))

    def _has_global_unfinished_reqs(self, unfinished):
        self.step_counter += 1
        if self.step_counter != 1 and self.step_counter % 16:
            return True
        return ParallelConfig.sync_dp_state(self.dp_group, unfinished)
