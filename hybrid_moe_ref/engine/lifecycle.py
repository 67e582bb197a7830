"""The server: its start-up phases in order, then the serve loop.

    load        build this rank's part of the model                      no collective
    page_setup  unify the page size of KV and recurrent state            no collective
    prepare     builds and other lazy local work, then one vote          a small all-reduce over all ranks
    profile     one full-size dummy step                                 C1, then the layers' (C2, C3, tp); first
                                                                         those of tuning, if configured
    compile     torch.compile, if configured, then one vote              none, or as prepare
    allocate    pages for the cache                                      no collective
    capture     two dummy steps for each captured size, if configured    none, or as profile for each
    serve       steps until no rank has work left                        as profile; one more every
                                                                         `unfinished_interval` steps

The order is vLLM's, but `prepare` comes before the first model execution: work that may build, tune or fail on one rank
alone is done before any rank depends on it.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from hybrid_moe_kernels import registry
from hybrid_moe_kernels.extension import default_cache, on_first_use

from hybrid_moe_ref import checkpoint
from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache, Sequence, cache_layout
from hybrid_moe_ref.cache.pages import PageLayout
from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.drafting import Drafting
from hybrid_moe_ref.engine.feed import DUMMY, Feed, feed_hash
from hybrid_moe_ref.engine.graphs import padded_size
from hybrid_moe_ref.engine.plan import ANYONE_UNFINISHED, EAGER, GRAPH, StepPlan
from hybrid_moe_ref.engine.policies import NewTokens, Policies
from hybrid_moe_ref.engine.runner import ModelRunner
from hybrid_moe_ref.engine.sampling import likeliest_tokens
from hybrid_moe_ref.engine.scheduler import Request, Running, Scheduler
from hybrid_moe_ref.engine.server_config import ServerConfig, configuration_differences
from hybrid_moe_ref.engine.startup.autotune import ExpertTuner
from hybrid_moe_ref.engine.startup.backends import PreparedKernels, apply_backends
from hybrid_moe_ref.engine.startup.builds import DEADLINE_S, BuildPlace
from hybrid_moe_ref.engine.startup.compilation import Compiler
from hybrid_moe_ref.engine.startup.refusal import check_start
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from hybrid_moe_ref.parallel.layout import apply_layout
from hybrid_moe_ref.parallel.observer import ScheduleEntry

T = TypeVar("T")

ERROR_BYTES = 512
"""How many bytes of the first error's text are sent to every rank."""


COULD_NOT_PREPARE = "could not prepare"
CONFIGURED_DIFFERENTLY = "the ranks are configured differently"


class PrepareFailed(RuntimeError):
    """A rank could not prepare, or has another configuration. Raised on every rank with the same message."""


def _stopped(message: str) -> RuntimeError:
    """The error for the message with which a rank stopped this one.

    PrepareFailed if that rank could not prepare; ScheduleMismatch if it is past that phase and its guard refused it.
    """
    in_prepare = COULD_NOT_PREPARE in message or CONFIGURED_DIFFERENTLY in message
    return PrepareFailed(message) if in_prepare else ScheduleMismatch(message)


class Engine:
    """One rank of the server. Constructing it runs every phase up to `serve`; :meth:`serve` runs the loop.

    Raises PrepareFailed on every rank when one of them cannot take part, ConfigError for sizes that do not fit, Refused
    for a configuration that could deadlock, and RuntimeError for a communicator that was stopped before. A rank that
    fails in a phase other than `prepare` raises its own error, and all others raise ScheduleMismatch with its text. In
    `serve` with checks="observe" the others are not stopped, and wait until their collective's timeout.
    """

    def __init__(self, config: ServerConfig, comm: Communicator, policies: Policies | None = None) -> None:
        self.config = config
        self.comm = comm
        self._policies = policies or Policies()
        self._num_steps = 0
        comm.begin_use()
        try:
            self._start()
        except PrepareFailed:
            raise  # every other rank raises it too
        except Exception as error:
            comm.guard.stop_others(error)
            raise

    def _start(self) -> None:
        config, comm = self.config, self.comm
        for finding in check_start(config, self._policies):
            if comm.rank == 0:
                print(f"[rank 0] --allow-unsafe: started although {finding}", file=sys.stderr, flush=True)
        comm.guard.release()  # from the last step of an earlier engine on these ranks
        if config.checks == "strict":
            comm.start_strict_comparison()
        if config.checks != "observe":
            comm.start_watchdog()
        self.model, self.runner = self._phase("load", self._load)
        self.page_layout = self._phase("page_setup", self._page_setup)
        self._drafting = Drafting(self.model, self.runner, self._policies.drafts, config.engine, self.page_layout)
        self._phase("prepare", self._prepare)
        self._kernels = PreparedKernels.of_now(self.comm.device, getattr(torch, config.engine.dtype))
        self._phase("profile", self._profile)
        self._phase("compile", self._compile)
        self.cache = self._phase("allocate", self._allocate)
        self._phase("capture", self._capture)

    def _phase(self, name: str, run: Callable[[], T]) -> T:
        self.comm.observer.phase(name)
        return run()

    def _load(self) -> tuple[HybridMoE, ModelRunner]:
        """Build this rank's part of the model. It is cut on the meta device, so no rank ever holds the whole model."""
        dtype = getattr(torch, self.config.engine.dtype)
        model = HybridMoE(self.config.served_model, device="meta", dtype=dtype)
        context = apply_layout(model, self.comm, self.config.parallel, self._policies.dispatch, self._policies.adder)
        self._extensions = apply_backends(model, self.config.engine, self.comm.device)
        self._take_first_uses()
        if self.config.checkpoint:
            checkpoint.load_weights(model, self.config.checkpoint, self.comm.device)
        else:
            model.init_weights(self.config.seed, device=self.comm.device)
        return model, ModelRunner(model, context, self.comm, self._policies, self.config)

    def _take_first_uses(self) -> None:
        """Load modules at their first use by this engine's policies, not by those of an engine that started later."""
        on_first_use(lambda extension: self._policies.builds.first_use(extension, self._build_place()))

    def _page_setup(self) -> PageLayout:
        layout = cache_layout(self.model.config, getattr(torch, self.config.engine.dtype))
        if (needed := layout.pages_for(1)) > self.config.engine.num_pages:
            have = f"{self.config.engine.num_pages} is less than {needed}"
            raise ConfigError(f"{have}, which a sequence of one token takes", "engine.num_pages")
        return layout

    def _prepare(self) -> None:
        place = self._build_place()

        def heartbeat() -> None:
            self.comm.observer.local("heartbeat", "prepares kernels")
            place.check()

        def work() -> None:
            registry.prepare(heartbeat)
            self._policies.builds.prepare(self._extensions, place)
            self._policies.builds.warm_up(self.runner.warm_up)

        self._all_or_none(work)

    def _all_or_none(self, work: Callable[[], None]) -> None:
        """Do local work that may fail or take long, then vote: all ranks continue, or all stop with the first error."""
        self.comm.guard.finish()
        error = ""
        try:
            work()
        except ScheduleMismatch:
            pass  # the rank that stopped the others published the reason
        except Exception as failure:  # stops ranks that still work at once, and all ranks in the vote
            error = f"{type(failure).__name__}: {failure}"
            self.comm.stop_all(f"rank {self.comm.rank} {COULD_NOT_PREPARE}: {error}")
        try:
            # The vote waits for ranks that still build or compile, even if the timeout of a collective is shorter. It
            # does so whatever `checks` is: the vote compares configurations, so it must not depend on them.
            with self.comm.patiently(DEADLINE_S):
                self._vote(error)
        except (ScheduleMismatch, PrepareFailed) as stopped:  # the published message is the same on all ranks
            raise _stopped(self.comm.stopped_by() or str(stopped)) from None
        if message := self.comm.stopped_by():
            raise _stopped(message)

    def _build_place(self) -> BuildPlace:
        def sum_up(numbers: list[int], layer: str) -> list[int]:
            sums: list[int] = self.comm.all_reduce(self.comm.everyone, torch.tensor(numbers), layer=layer).tolist()
            return sums

        folder = self.config.engine.cache_dir
        cache = Path(folder) / "kernels" if folder else default_cache()
        return BuildPlace(cache, self.comm.rank, self.comm.observer, self.comm.stopped_by, sum_up)

    def _vote(self, error: str) -> None:
        rank, num_ranks = self.comm.rank, self.config.parallel.world_size
        digest = self._policies.ballot.digest(self.config)
        ballot = torch.tensor([rank if error else num_ranks, digest, -digest])
        first_failed, lowest, negative_highest = self._over_all_ranks(ballot, "min", "vote")
        if lowest != -negative_highest:
            texts = self.comm.all_gather_text(self.comm.everyone, self.config.shared_text(), layer="configuration")
            differences = configuration_differences(texts)
            raise PrepareFailed(
                f"{CONFIGURED_DIFFERENTLY}: {differences}: start every rank with the same configuration"
            )
        if first_failed < num_ranks:
            words = (
                error.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0") if rank == first_failed else bytes(ERROR_BYTES)
            )
            numbers = self._over_all_ranks(torch.tensor(list(words), dtype=torch.int32), "sum", "first error")
            text = bytes(numbers).rstrip(b"\0").decode(errors="replace")
            raise PrepareFailed(f"rank {first_failed} {COULD_NOT_PREPARE}: {text}")

    def _over_all_ranks(self, x: torch.Tensor, reduce_op: str, layer: str) -> list[int]:
        numbers: list[int] = self.comm.all_reduce(self.comm.everyone, x, reduce_op, layer=layer).tolist()
        return numbers

    def _profile(self) -> None:
        """Tune, if configured. Then run the model for the first time, with the most tokens that a step may have."""
        if self.config.engine.autotune and self.config.model.num_experts:
            self._policies.tuning.tune(self._tuner())
        self._execute_dummy(self.config.engine.max_num_batched_tokens, may_replay=False)

    def _tuner(self) -> ExpertTuner:
        """A tuner for the numbers of rows that the experts process in a decode step and in a full step."""
        engine, parallel = self.config.engine, self.config.parallel
        num_senders = parallel.dp_size if parallel.expert_parallel else 1
        rows = (engine.max_num_seqs * num_senders, engine.max_num_batched_tokens * num_senders)
        return ExpertTuner(self.model, self.comm, rows, engine.cache_dir, self._declare)

    def _declare(self, schedule: tuple[ScheduleEntry, ...]) -> None:
        """Begin a step with this schedule and without a model execution."""
        self.runner.declare(self._plan([], 0, False), schedule)

    def _compile(self) -> None:
        if self.config.engine.compile:
            compiler = Compiler(self.model, self._build_place())
            self._all_or_none(lambda: self._policies.compilation.prepare(compiler))

    def _capture(self) -> None:
        """Run a warm-up step and a captured step for each size, largest first, on all ranks."""
        for size in reversed(self.config.engine.graph_sizes):
            self._execute_dummy(size, may_replay=False)
            self._execute_dummy(size)

    def _allocate(self) -> HybridCache:
        engine = self.config.engine
        dtype = getattr(torch, engine.dtype)
        self._drafting.allocate()
        return HybridCache(self.model.config, engine.num_pages, device=self.comm.device, dtype=dtype)

    @torch.inference_mode()
    def serve(
        self, requests: Iterable[Request], on_token: Callable[[str, int], None] | None = None
    ) -> dict[str, list[int]]:
        """Serve this rank's requests greedily, and take part in every step until no rank has work left.

        on_token: called with the request's id and each new token

        Returns the new tokens of each request by its id. Raises ConfigError for a request that cannot be served, and
        when the kernels of the process are no longer those that this engine was started with.
        """
        self.comm.observer.phase("serve")
        self.comm.check_running()
        self._take_first_uses()
        self.comm.limit_waits(self.config.engine.collective_limit_s)
        try:
            return self._serve(requests, on_token)
        except Exception as error:
            if self.config.checks != "observe":
                self.comm.guard.stop_others(error)
            raise

    def _serve(self, requests: Iterable[Request], on_token: Callable[[str, int], None] | None) -> dict[str, list[int]]:
        self._kernels.check()
        requests = list(requests)
        for request in requests:
            self.model.check_tokens(torch.tensor(request.prompt))
        scheduler = Scheduler(requests, self.config.engine, self.page_layout.pages_for)
        sequences: dict[Running, Sequence] = {}
        make_room = functools.partial(self._make_room, scheduler, sequences)
        for serve_step in itertools.count():
            asks = (serve_step + 1) % self.config.engine.unfinished_interval == 0
            self._policies.preemption.before_step(make_room)
            running = scheduler.schedule(serve_step)
            if running:
                step = functools.partial(self._execute_live, scheduler, running, sequences, asks)
                tokens = self._policies.preemption.run(step, make_room)
                if on_token is not None:
                    for request_id, token in tokens:
                        on_token(request_id, token)
            elif (num_tokens := self._policies.idle.dummy_tokens(scheduler.unfinished)) is not None:
                self._policies.idle.run(functools.partial(self._execute_dummy, num_tokens, asks))
            else:
                self.runner.leave()
                break
            if asks and not self._anyone_unfinished(scheduler.unfinished):
                break
        return scheduler.finished

    def _execute_live(
        self, scheduler: Scheduler, running: list[Running], sequences: dict[Running, Sequence], asks: bool
    ) -> NewTokens:
        """Run one step of this rank's requests; return the new tokens of each."""
        for request in running:
            if request not in sequences:
                sequences[request] = self.cache.allocate()
        mine = [sequences[request] for request in running]
        feeds = [Feed(r.request.request_id, r.num_cached, tuple(r.next_tokens())) for r in running]
        batch = Batch.of([(sequence, len(feed.tokens)) for sequence, feed in zip(mine, feeds, strict=True)])
        tokens_N = torch.tensor([token for feed in feeds for token in feed.tokens], device=self.comm.device)
        plan = self._plan(feeds, len(running), asks)
        check = self._drafting.begin(running, mine, batch)
        hidden_NH = self.runner.execute(plan, tokens_N, batch, self.cache, feeds)
        chosen = likeliest_tokens(self.model, hidden_NH, batch.last_rows.tolist(), check.counts)
        made = check.new_tokens(chosen)
        new_tokens = [r.request.until_stop(tokens) for r, tokens in zip(running, made, strict=True)]
        completed = scheduler.update(new_tokens)
        self._drafting.draft(check, tokens_N, hidden_NH)
        self._release(completed, sequences)
        return [(r.request.request_id, token) for r, new in zip(running, new_tokens, strict=True) for token in new]

    def _make_room(self, scheduler: Scheduler, sequences: dict[Running, Sequence]) -> None:
        """Preempt requests for which the cache lacks pages. They wait, and then run from the beginning again."""
        self._release(scheduler.make_room(), sequences)

    def _release(self, requests: list[Running], sequences: dict[Running, Sequence]) -> None:
        """Free the cache pages of these requests."""
        for request in requests:
            self.cache.free(sequences.pop(request))
            self._drafting.end(request)

    def _execute_dummy(self, num_tokens: int, asks_unfinished: bool = False, may_replay: bool = True) -> None:
        """Run a step with dummy tokens: a rank without requests takes part in every collective."""
        feeds = [Feed(DUMMY, 0, (0,) * num_tokens)]
        plan = self._plan(feeds, 0, asks_unfinished, may_replay)
        tokens_N = torch.zeros(num_tokens, dtype=torch.long, device=self.comm.device)
        with torch.inference_mode():
            batch = Batch.dummy(num_tokens, self.comm.device)
            self._drafting.draft_dummy(tokens_N, self.runner.execute(plan, tokens_N, batch, None, feeds), batch)

    def _plan(self, feeds: list[Feed], num_live: int, asks_unfinished: bool, may_replay: bool = True) -> StepPlan:
        """This rank's proposal for the step: a graph if one is large enough; two halves if there are enough tokens."""
        engine, num_tokens = self.config.engine, sum(len(feed.tokens) for feed in feeds)
        padded = padded_size(num_tokens, engine.graph_sizes) if may_replay else None
        plan = StepPlan(
            self._num_steps,
            num_tokens,
            num_live,
            padded_tokens=padded or 0,
            mode=GRAPH if padded else EAGER,
            wants_microbatch=0 < engine.microbatch_tokens <= num_tokens,
            asks_unfinished=asks_unfinished,
            draft_rows=self._drafting.num_rows(num_live),
            feed_hash=feed_hash(feeds) if self.config.parallel.tp_size > 1 else 0,
        )
        self._num_steps += 1
        return plan

    def _anyone_unfinished(self, mine: bool) -> bool:
        answer = torch.tensor([int(mine)], dtype=torch.int32)
        return bool(self.comm.all_reduce(self.runner.agreeing, answer, "max", layer=ANYONE_UNFINISHED).item())
