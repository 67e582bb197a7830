"""The server: its start-up phases in order, then the serve loop.

    phase       what a rank does                                         its collectives
    load        build this rank's part of the model                      none
    page_setup  choose one page size for KV and recurrent states         none
    prepare     build the kernels and run them once, then vote           a small all-reduce over all ranks
    profile     tune, if configured; then run one full-size dummy step   tuning: a vote, then an all-reduce per timing;
                                                                         step: C1, then the collectives of the layers
                                                                         (C2, C3, tp)
    compile     if configured, run torch.compile, then vote              as in `prepare`
    allocate    allocate the pages of the cache                          none
    capture     if configured, run two dummy steps for each size         in each step: as in the step of `profile`
    serve       run steps until no rank has work left                    in each step: as in the step of `profile`; some
                                                                         steps end with the "unfinished" all-reduce

The order is vLLM's, except that `prepare` comes before the first model execution. So work that can take long or fail on
one rank alone, such as a kernel build, is done before other ranks wait for that rank. `profile` allocates the
activations of the largest step, which the memory check before a start (`memory.check_memory`) does not count. If these
activations do not fit into memory, the error comes in `profile` and not while serving.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from hybrid_moe_kernels import registry
from hybrid_moe_kernels.extension import default_cache, on_first_use

from hybrid_moe_ref import checkpoint
from hybrid_moe_ref.cache.hybrid_cache import HybridCache, cache_layout
from hybrid_moe_ref.cache.pages import PageLayout
from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.drafting import Drafting
from hybrid_moe_ref.engine.serving.loop import OnToken, ServeLoop
from hybrid_moe_ref.engine.serving.scheduler import Request, Scheduler
from hybrid_moe_ref.engine.serving.steps import Steps
from hybrid_moe_ref.engine.startup.autotune import ExpertTuner
from hybrid_moe_ref.engine.startup.backends import PreparedKernels, apply_backends
from hybrid_moe_ref.engine.startup.builds import BuildPlace
from hybrid_moe_ref.engine.startup.compilation import Compiler
from hybrid_moe_ref.engine.startup.refusal import check_start
from hybrid_moe_ref.engine.startup.vote import PrepareFailed, StartVote
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.sharding.layout import apply_layout

T = TypeVar("T")


class Engine:
    """One rank of the server. The constructor runs every phase before `serve`; :meth:`serve` runs the loop.

    The constructor raises:

    PrepareFailed  on every rank, if a rank could not prepare or compile, or if the configurations of the ranks differ
    ConfigError    if a setting does not fit the model or the device, for example too few pages for one token
    Refused        for a configuration that could deadlock
    RuntimeError   if an earlier engine on this communicator failed and so stopped all ranks: make a new communicator

    The phases `prepare` and `compile` end with a vote, so all ranks raise the same PrepareFailed. In every other phase,
    a rank that fails raises its own error, and all other ranks raise ScheduleMismatch with the text of this error.
    There is one exception: with checks="observe", a rank that fails in `serve` does not stop the other ranks. They wait
    until the timeout of their collective.
    """

    def __init__(self, config: ServerConfig, comm: Communicator, policies: Policies | None = None) -> None:
        self.config = config
        self.comm = comm
        self._policies = policies or Policies()
        self._dtype: torch.dtype = getattr(torch, config.engine.dtype)
        comm.begin_use()
        with self._failing_together():
            self._begin()
            self.model, self.runner = self._phase("load", self._load)
            self.page_layout = self._phase("page_setup", self._page_setup)
            self._drafting = Drafting(self.model, self.runner, self._policies.drafts, config.engine, self.page_layout)
            self._steps = Steps(config, self.runner, self._drafting, comm.device)
            self._kernels = self._phase("prepare", self._prepare)
            self._phase("profile", self._profile)
            self._phase("compile", self._compile)
            self.cache = self._phase("allocate", self._allocate)
            self._phase("capture", self._capture)

    def serve(self, requests: Iterable[Request], on_token: OnToken | None = None) -> dict[str, list[int]]:
        """Serve this rank's requests greedily, and take part in every step until no rank has work left.

        Returns, for each request id, the new tokens of the request. Raises InputError for a request that cannot be
        served, and ConfigError if the kernels of the process are no longer those with which this engine was started.

        on_token: called with the request's id and each new token
        """
        self.comm.observer.phase("serve")
        self.comm.check_running()
        self._take_first_uses()
        self.comm.limit_waits(self.config.engine.collective_limit_s)
        with self._failing_together() if self.config.checks != "observe" else contextlib.nullcontext():
            self._kernels.check()
            requests = list(requests)
            for request in requests:
                self.model.check_tokens(torch.tensor(request.prompt))
            scheduler = Scheduler(requests, self.config.engine, self.page_layout.pages_for)
            loop = ServeLoop(
                scheduler, self.model, self.cache, self.runner, self._steps, self._drafting, self._policies
            )
            return loop.run(on_token)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """If the body of the ``with`` raises an error, stop the other ranks with the text of this error."""
        try:
            yield
        except PrepareFailed:
            raise  # every other rank raises it too
        except Exception as error:
            self.comm.guard.stop_others(error)
            raise

    def _phase(self, name: str, run: Callable[[], T]) -> T:
        self.comm.observer.phase(name)
        return run()

    def _begin(self) -> None:
        """Switch on the checks that `config.checks` names.

        Raises Refused for a configuration that could deadlock, unless `allow_unsafe` is set.
        """
        for finding in check_start(self.config, self._policies):
            if self.comm.rank == 0:
                print(f"[rank 0] --allow-unsafe: started although {finding}", file=sys.stderr, flush=True)
        # the guard may still be active from the last step of an earlier engine on these ranks
        self.comm.guard.release()
        if self.config.checks == "strict":
            self.comm.start_strict_comparison()
        if self.config.checks != "observe":
            self.comm.start_watchdog()

    def _load(self) -> tuple[HybridMoE, ModelRunner]:
        """Build this rank's part of the model. The model is cut on the meta device, so no rank holds all parameters."""
        model = HybridMoE(self.config.served_model, device="meta", dtype=self._dtype)
        context = apply_layout(model, self.comm, self.config.parallel, self._policies.dispatch, self._policies.adder)
        self._extensions = apply_backends(model, self.config.engine, self.comm.device)
        self._take_first_uses()
        if self.config.checkpoint:
            checkpoint.load_weights(model, self.config.checkpoint, self.comm.device)
        else:
            model.init_weights(self.config.seed, device=self.comm.device)
        return model, ModelRunner(model, context, self.comm, self._policies, self.config)

    def _page_setup(self) -> PageLayout:
        layout = cache_layout(self.model.config, self._dtype)
        num_pages, needed = self.config.engine.num_pages, layout.pages_for(1)
        if needed > num_pages:
            problem = f"{num_pages} is less than the {needed} pages of a sequence of one token"
            raise ConfigError(problem, "engine.num_pages")
        return layout

    def _prepare(self) -> PreparedKernels:
        place = self._build_place()

        def heartbeat() -> None:
            self.comm.observer.local("heartbeat", "prepares kernels")
            place.check()

        def work() -> None:
            registry.prepare(heartbeat)
            self._policies.builds.prepare(self._extensions, place)
            self._policies.builds.warm_up(self.runner.warm_up)

        self._vote().all_or_none(work)
        return PreparedKernels.of_now(self.comm.device, self._dtype)

    def _profile(self) -> None:
        """Tune, if configured. Then run the model for the first time, with the largest number of tokens of a step."""
        if self.config.engine.autotune and self.config.model.num_experts:
            self._policies.tuning.tune(self._tuner())
        self._steps.dummy(self.config.engine.max_num_batched_tokens, may_replay=False)

    def _compile(self) -> None:
        if self.config.engine.compile:
            compiler = Compiler(self.model, self._build_place())
            self._vote().all_or_none(lambda: self._policies.compilation.prepare(compiler))

    def _allocate(self) -> HybridCache:
        self._drafting.allocate()
        return HybridCache(self.model.config, self.config.engine.num_pages, device=self.comm.device, dtype=self._dtype)

    def _capture(self) -> None:
        """Run a warm-up step and a captured step for each size, largest first, on all ranks."""
        for size in reversed(self.config.engine.graph_sizes):
            self._steps.dummy(size, may_replay=False)
            self._steps.dummy(size)

    def _vote(self) -> StartVote:
        return StartVote(self.config, self.comm, self._policies.ballot)

    def _take_first_uses(self) -> None:
        """Make the policy `builds` of this engine load each extension that a kernel needs at its first use.

        The process has only one function that loads such extensions, and each engine in the process replaces it. So
        `serve` calls this again.
        """
        on_first_use(lambda extension: self._policies.builds.first_use(extension, self._build_place()))

    def _build_place(self) -> BuildPlace:
        def sum_up(numbers: list[int], layer: str) -> list[int]:
            sums: list[int] = self.comm.all_reduce(self.comm.everyone, torch.tensor(numbers), layer=layer).tolist()
            return sums

        folder = self.config.engine.cache_dir
        cache = Path(folder) / "kernels" if folder else default_cache()
        return BuildPlace(cache, self.comm.rank, self.comm.observer, self.comm.stopped_by, sum_up)

    def _tuner(self) -> ExpertTuner:
        """Return the object that tunes the experts, for the numbers of rows of a decode step and of a full step."""
        engine, parallel = self.config.engine, self.config.parallel
        num_senders = parallel.dp_size if parallel.expert_parallel else 1
        rows = (engine.max_num_seqs * num_senders, engine.max_num_batched_tokens * num_senders)
        return ExpertTuner(self.model, self.comm, rows, engine.cache_dir, self._steps.declare)
