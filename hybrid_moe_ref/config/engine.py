"""The limits of one rank's engine, and how it runs a step."""

from dataclasses import dataclass

from hybrid_moe_ref.config.base import Config, ConfigError, at_least, nearest

ENGINE_MODES = ("eager", "graphs")
GDN_PREFILL_BACKENDS = ("auto", "torch", "triton", "jit")
MOE_BACKENDS = ("auto", "torch", "jit")
PROTOCOLS = ("0.20", "0.33")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig(Config):
    """Limits of one rank's serve loop, and how it runs a step.

    max_num_seqs       largest number of requests that run at once; the others wait in order of arrival
    max_num_batched_tokens
                       largest number of tokens of a step. Running requests come first; new prompts get the tokens that
                       are left
    num_pages          number of pages of a rank's KV cache; if they are too few for all requests, the youngest requests
                       wait
    protocol           a version of vLLM, "0.20" or "0.33": the ranks exchange the same numbers, in the same steps, as
                       this version does
    unfinished_interval
                       number of steps between two "anyone unfinished?" all-reduces; the ranks can leave the serve loop
                       only after such an all-reduce. 0: the number that `protocol` gives
    dtype              dtype of weights, activations and KV cache: one of DTYPES
    mode               "eager", or "graphs": small steps are padded to a captured size and replayed
    capture_sizes      the captured sizes; () means 1, 2, 4, ... and max_num_seqs, which cover every decode step
                       without drafts. Used only with mode "graphs"
    microbatch_tokens  a rank with at least this many tokens proposes to split the step in two; 0: never
    compile            compile norms, routers, shared experts and MLPs by torch.compile (needs a C++ compiler on a CPU)
    autotune           at the start, time each tactic (way to compute the experts), and agree on the fastest
    cache_dir          folder for tuning results and compiled code. "": tuning results are not saved, and compiled
                       code goes to the user's cache folder
    gdn_prefill_backend, moe_backend
                       backend of the GDN prefill, and of the routed experts. "auto" selects one from the kernels'
                       registry, "torch" is plain PyTorch, "jit" is compiled on this machine; "triton" (only for the
                       GDN prefill) needs a GPU
    num_drafts         number of tokens that the MTP layer drafts for each request
    collective_limit_s longest time in seconds that a rank waits in one collective while serving; after this time the
                       rank stops all ranks. 0: no limit
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 256
    num_pages: int = 256
    protocol: str = "0.20"
    unfinished_interval: int = 0
    dtype: str = "float32"
    mode: str = "eager"
    capture_sizes: tuple[int, ...] = ()
    microbatch_tokens: int = 0
    compile: bool = False
    autotune: bool = False
    cache_dir: str = ""
    gdn_prefill_backend: str = "auto"
    moe_backend: str = "auto"
    num_drafts: int = 0
    collective_limit_s: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "max_num_seqs", "max_num_batched_tokens", "num_pages")
        at_least(self, 0, "unfinished_interval", "microbatch_tokens", "num_drafts")
        if not 0 <= self.collective_limit_s < float("inf"):
            raise ConfigError(
                f"{self.collective_limit_s} is not a number of seconds of at least 0", "collective_limit_s"
            )
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}; known: {', '.join(PROTOCOLS)}", "protocol")
        if self.mode not in ENGINE_MODES:
            raise ConfigError(f"unknown mode {self.mode!r}{nearest(self.mode, ENGINE_MODES)}", "mode")
        for index, size in enumerate(self.capture_sizes):
            if not 1 <= size <= self.max_num_batched_tokens:
                raise ConfigError(
                    f"{size} is not between 1 and max_num_batched_tokens {self.max_num_batched_tokens}",
                    f"capture_sizes[{index}]",
                )
        if self.max_num_batched_tokens < self.max_num_seqs * (1 + self.num_drafts):
            drafts = f" x (1 + num_drafts {self.num_drafts})" if self.num_drafts else ""
            raise ConfigError(
                f"{self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}{drafts}: a decode step "
                "would have no room for a token of every sequence",
                "max_num_batched_tokens",
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, DTYPES)}", "dtype")
        for name, names in (("gdn_prefill_backend", GDN_PREFILL_BACKENDS), ("moe_backend", MOE_BACKENDS)):
            if (backend := getattr(self, name)) not in names:
                raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(names)}", name)
        if self.autotune and self.moe_backend != "auto":
            raise ConfigError(
                f"with moe_backend {self.moe_backend!r} there is only one way to compute the experts, so there is "
                "nothing to tune: set moe_backend to 'auto', or autotune to false",
                "autotune",
            )
        if self.moe_backend == "jit" and self.dtype not in ("float32", "float64"):
            raise ConfigError(f"'jit' computes in float32 and float64, not in dtype {self.dtype}", "moe_backend")

    @property
    def compiles_kernels(self) -> bool:
        """Whether a backend is "jit", which is compiled on this machine."""
        return "jit" in (self.gdn_prefill_backend, self.moe_backend)

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Captured sizes in ascending order; empty in eager mode."""
        if self.mode == "eager":
            return ()
        powers = (1 << exponent for exponent in range(self.max_num_seqs.bit_length()))
        return tuple(sorted({*(self.capture_sizes or (*powers, self.max_num_seqs))}))
