"""Serve a tiny Qwen3.5-MoE with the real vLLM: DP=2, EP=2, on a CPU. Run it with the interpreter of vLLM's venv.

    python tests/vllm/serve.py --out DIR [--waves 5:8,5:12 3:40,0:0] [--seconds 60 --period 10]

A wave is one item per rank, PROMPT:NEW: the number of prompt tokens and of new tokens; 0:0 leaves the rank idle. With
--period a wave begins on all ranks each so many seconds, so that the engines also wait for requests. The ranks are
forked from one process that has imported vLLM, so that they start in half a minute. The output tokens of rank R are
written to DIR/outputs<R>.json. Nothing is left: the process ends its children and theirs by the deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

COMMON = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
    "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "hybrid": {
        **COMMON, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
    "attention": {
        **COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": 128,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip
"""Layers GGGA, and AAAA for vLLM before 0.24, whose CPU build has no GDN."""

PRELOADED = (
    "vllm", "vllm.v1.engine.core", "vllm.v1.engine.core_client", "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor", "vllm.model_executor.models.qwen3_5",
    "vllm.model_executor.models.qwen3_moe",
)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--waves", nargs="*", default=["5:8,5:12"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile; one rank only, on a CPU")
    parser.add_argument("--model", choices=list(MODELS), default="hybrid")
    parser.add_argument("--seconds", type=float, default=0.0, help="repeat the waves for so long")
    parser.add_argument("--period", type=float, default=0.0, help="seconds from one wave to the next; 0: no pause")
    parser.add_argument("--leave", action="store_true", help="end the ranks without a shutdown of their engines")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds after which all processes are ended")
    return parser.parse_args()


def _environment(num_ranks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update({
        "VLLM_DP_SIZE": str(num_ranks), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port),
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": _binding(), "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HMR_CPU_EP": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "1500",
    })  # fmt: skip


def _binding() -> str:
    """Which processors the workers use: not bound, but 0.20 fails with "nobind" while it logs what it bound."""
    return f"0|{min(1, (os.cpu_count() or 1) - 1)}" if _is_old() else "nobind"


def _is_old() -> bool:
    """Whether this is vLLM 0.20, or another one before 0.24."""
    version = importlib.metadata.version("vllm-cpu").split(".")
    return (int(version[0]), int(version[1])) < (0, 24)


def _mend_old() -> None:
    """Let workers of vLLM 0.20 run with a torch that was built for CUDA, where there is no device to wait for."""
    import torch

    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda *_: None


def _preload() -> None:
    """Import vLLM, and make it fork its processes from then on."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    if _is_old():
        _mend_old()
    context = multiprocessing.get_context("fork")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and "get_mp_context" in vars(module):
            module.get_mp_context = lambda: context  # type: ignore[attr-defined]


def _serve(rank: int, model: Path, args: argparse.Namespace) -> None:
    os.environ.update({"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)})
    log = os.open(args.out / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm: Any = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, enforce_eager=not args.compiled,
        enable_expert_parallel=True, distributed_executor_backend="mp", max_model_len=512, max_num_seqs=8,
        max_num_batched_tokens=512, seed=0, async_scheduling=False,
    )  # fmt: skip
    (args.out / f"up{rank}").touch()
    if args.period:  # the ranks count the periods from one moment, when the last of them is up
        _wait_for_files(args, "up")
    began_s, outputs = time.monotonic(), []
    while True:
        for wave in args.waves:
            if args.period:
                time.sleep(max(0.0, began_s + len(outputs) * args.period - time.monotonic()))
            prompt, new = map(int, wave.split(",")[rank].split(":"))
            params = SamplingParams(temperature=0.0, max_tokens=new or 1, ignore_eos=True, detokenize=False)
            prompts = [TokensPrompt(prompt_token_ids=[7 + i for i in range(prompt)])] if prompt else []
            results = llm.generate(prompts, params, use_tqdm=False) if prompts else []
            outputs.append([list(result.outputs[0].token_ids) for result in results])
        if time.monotonic() >= began_s + args.seconds:
            break
    (args.out / f"outputs{rank}.json").write_text(json.dumps(outputs[: len(args.waves)]))
    _wait_for_all(args, rank)
    if args.leave:  # as a child of multiprocessing at its end, which runs no other exit function
        multiprocessing.util._exit_function()
    llm.llm_engine.engine_core.shutdown()


def _wait_for_all(args: argparse.Namespace, rank: int) -> None:
    """Keep the engine until all ranks have their outputs: an engine that leaves early leaves the others in a wave."""
    (args.out / f"done{rank}").touch()
    _wait_for_files(args, "done")
    time.sleep(3.0)  # the wave ends after the last output


def _wait_for_files(args: argparse.Namespace, name: str) -> None:
    while not all((args.out / f"{name}{rank}").exists() for rank in range(args.ranks)):
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found, queue = [], [pid]
    while queue:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{queue[0]}/task"):
                children = Path(f"/proc/{queue[0]}/task/{task}/children").read_text().split()
                queue += map(int, children)
                found += map(int, children)
        queue.pop(0)
    return found


def _with_libgomp() -> None:
    """Start again with torch's OpenMP library: vLLM's CPU kernels need it before anything else loads another one."""
    import importlib.util

    torch = importlib.util.find_spec("torch")
    library = next(iter(Path(torch.submodule_search_locations[0]).glob("lib/libgomp*.so*")), None) if torch else None
    if library is not None and "libgomp" not in os.environ.get("LD_PRELOAD", ""):
        os.environ.update(LD_PRELOAD=str(library), OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _is_ours(pid: int) -> bool:
    """Whether a process that was a child once still is one of vLLM: a pid may have been used again."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/comm").read_text()
        return any(word in text for word in ("serve.py", "VLLM", "vllm", "multiprocessing"))
    return False


def main() -> int:
    args = _arguments()
    _with_libgomp()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.absolute()
    model = args.out / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[args.model]))
    _environment(args.ranks)
    _preload()
    children = []
    for rank in range(args.ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _serve(rank, model, args)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    deadline, codes = time.monotonic() + args.deadline, {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started: set[int] = set()
    try:
        while len(codes) < args.ranks and time.monotonic() < deadline:
            started.update(descendants(os.getpid()))
            for pid in children:
                done, status = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.2)
        until = min(deadline, time.monotonic() + 15)  # engines and workers take a moment to shut down
        while any(map(_is_ours, started)) and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        started.update(descendants(os.getpid()))
        for pid in started:
            if _is_ours(pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
    return max((abs(code) for code in codes.values()), default=1) if len(codes) == args.ranks else 124


if __name__ == "__main__":
    sys.exit(main())
