"""Compute the page size that KV entries and recurrent states share. This module does not import torch.

A recurrent layer keeps a state of fixed size per sequence. An attention layer keeps some bytes per token. Both kinds of
layers take their pages from one pool, so all pages have one size. The number of tokens of an attention page is the
smallest multiple of 16 that makes the page at least as large as the largest state. A state is padded to the size of a
page.

The layers of each kind are divided into groups of at most `group_size` layers. `group_size` is the number of layers of
the rarest kind. The cache has `group_size` buffers, and each buffer has one row of bytes for each page. Page p is row p
of all buffers together. All groups share these pages, and at any time a page belongs to one group of one sequence: row
p of buffer i has the data of the i-th layer of this group.

An example: a model has 3 attention layers and 3 GDN layers. They are two groups of 3 layers, so there are 3 buffers. If
a sequence takes page 7 for its GDN group, row 7 of each buffer has the state of one GDN layer.

A sequence takes one page for each recurrent group. For each attention group it takes ceil(length / tokens) pages, where
`tokens` is the number of tokens of an attention page.
"""

from collections import Counter
from dataclasses import dataclass

from hybrid_moe_ref.config import ConfigError, ModelConfig

TOKEN_MULTIPLE = 16


@dataclass(frozen=True)
class StateSize:
    """Size of one sequence's state in one recurrent layer.

    The state has two parts: the last inputs of the convolution (conv), and the state of the recurrence (ssm).

    conv_shape  (number of remembered inputs, channels)
    ssm_shape   (value heads, key head dim, value head dim) for GDN; (heads, head dim, state size) for Mamba-2
    """

    conv_shape: tuple[int, int]
    ssm_shape: tuple[int, int, int]
    conv_bytes: int
    ssm_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.conv_bytes + self.ssm_bytes


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind for which a sequence takes pages together: each page has room for all these layers.

    Layer `layers[i]` stores its data in buffer i, in the row of the page. Groups of all kinds use the same buffers, but
    a page belongs to only one group at a time.

    kind: "A" (attention), "G" (GDN) or "M" (Mamba-2)
    layers: indices of the layers in the model
    """

    kind: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class PageLayout:
    """The page size of a model, and its layer groups (layers of one kind that share page numbers).

    tokens            tokens of an attention page; 0 without attention layers
    page_bytes        bytes of a page in one buffer, that is, for one layer
    padding           unused bytes of a page that holds the largest state, as a fraction of this state; 0 without
                      recurrent layers
    bytes_per_token   bytes of one token's KV entries in one layer
    states            size of one sequence's state in one layer, by the kind of the layer ("G" or "M")
    groups            all layer groups
    group_size        largest number of layers in a group
    """

    tokens: int
    page_bytes: int
    padding: float
    bytes_per_token: int
    states: dict[str, StateSize]
    groups: tuple[LayerGroup, ...]
    group_size: int

    def pages_for(self, length: int) -> int:
        """Return how many pages one sequence of `length` tokens takes, summed over all layer groups.

        A layer group is a set of layers that share page numbers.
        """
        return sum(-(-length // self.tokens) if group.kind == "A" else 1 for group in self.groups)


def _share(config: ModelConfig, name: str, tp_size: int) -> int:
    value: int = getattr(config, name)
    if value % tp_size:
        raise ConfigError(f"{value} is not divisible by tp_size {tp_size}", name)
    return value // tp_size


def _share_or_hold(config: ModelConfig, name: str, tp_size: int) -> int:
    """Return how many heads each rank holds: its share of all heads, or 1 if there are more ranks than heads.

    name: the field of `config` that has the number of all heads (or the number of all Mamba-2 groups)

    Raises ConfigError if this number is neither a multiple nor a divisor of `tp_size`.
    """
    value: int = getattr(config, name)
    if value % tp_size and tp_size % value:
        raise ConfigError(f"{value} is neither divisible by tp_size {tp_size} nor a divisor of it", name)
    return max(1, value // tp_size)


def state_size(config: ModelConfig, kind: str, conv_itemsize: int, ssm_itemsize: int, tp_size: int = 1) -> StateSize:
    """Return the size of one sequence's state in one layer on one of `tp_size` ranks.

    kind           "G" (Gated DeltaNet) or "M" (Mamba-2)
    conv_itemsize  bytes of a number in the convolution's inputs
    ssm_itemsize   bytes of a number in the recurrent state

    Raises ConfigError if the sizes cannot be divided over the ranks.
    """
    if kind == "G":
        keys, values = (
            _share_or_hold(config, "linear_num_key_heads", tp_size),
            _share_or_hold(config, "linear_num_value_heads", tp_size),
        )
        # Ranks that share a value head hold different columns of its state.
        ranks_per_head = max(1, tp_size // config.linear_num_value_heads)
        if config.linear_value_head_dim % ranks_per_head:
            raise ConfigError(
                f"{config.linear_value_head_dim} is not divisible by {ranks_per_head}, the number of ranks that share "
                f"a value head (tp_size {tp_size})",
                "linear_value_head_dim",
            )
        value_dim = config.linear_value_head_dim // ranks_per_head
        channels = 2 * keys * config.linear_key_head_dim + values * value_dim
        conv = (config.linear_conv_kernel_dim - 1, channels)
        ssm = (values, config.linear_key_head_dim, value_dim)
    else:
        heads, groups = (
            _share(config, "mamba_num_heads", tp_size),
            _share_or_hold(config, "mamba_num_groups", tp_size),
        )
        channels = heads * config.mamba_head_dim + 2 * groups * config.mamba_state_size
        conv = (config.mamba_conv_kernel_dim - 1, channels)
        ssm = (heads, config.mamba_head_dim, config.mamba_state_size)
    return StateSize(
        conv_shape=conv,
        ssm_shape=ssm,
        conv_bytes=conv[0] * conv[1] * conv_itemsize,
        ssm_bytes=ssm[0] * ssm[1] * ssm[2] * ssm_itemsize,
    )


def page_layout(
    config: ModelConfig,
    itemsize: int = 2,
    *,
    kv_itemsize: int | None = None,
    ssm_itemsize: int = 4,
    tp_size: int = 1,
) -> PageLayout:
    """Return the page layout of `config` on one of `tp_size` ranks.

    itemsize      bytes of a number in the model's dtype; the states of the convolutions have this dtype too
    kv_itemsize   bytes of a number in keys and values; None: the same as `itemsize`
    ssm_itemsize  bytes of a number in a recurrent state

    If there are fewer KV heads, key heads or Mamba-2 groups than ranks, several ranks hold copies of the same head or
    group.

    Raises ConfigError if the sizes cannot be divided over the ranks.
    """
    kinds = Counter(config.layer_pattern)
    states = {kind: state_size(config, kind, itemsize, ssm_itemsize, tp_size) for kind in kinds if kind != "A"}
    largest = max((state.num_bytes for state in states.values()), default=0)
    bytes_per_token = tokens = 0
    if "A" in kinds:
        kv_heads = _share_or_hold(config, "num_key_value_heads", tp_size)
        bytes_per_token = 2 * kv_heads * config.head_dim * (kv_itemsize or itemsize)
        tokens = TOKEN_MULTIPLE * max(1, -(-largest // (TOKEN_MULTIPLE * bytes_per_token)))
    # Without attention, a page is the largest state, rounded up so that any row can be viewed in any dtype.
    page_bytes = tokens * bytes_per_token if tokens else -(-largest // 64) * 64

    group_size = min(kinds.values())
    groups = []
    for kind in sorted(kinds):
        layers = [index for index, letter in enumerate(config.layer_pattern) if letter == kind]
        for start in range(0, len(layers), group_size):
            groups.append(LayerGroup(kind, tuple(layers[start : start + group_size])))
    return PageLayout(
        tokens=tokens,
        page_bytes=page_bytes,
        padding=(page_bytes - largest) / largest if largest else 0.0,
        bytes_per_token=bytes_per_token,
        states=states,
        groups=tuple(groups),
        group_size=group_size,
    )
