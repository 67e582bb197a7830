"""What a layer sees of the cache in a step: one "past" for each group of sequences in the batch (`batch.Group`).

A past gives access to the KV entries or states of the group's sequences. The layer reads these entries or states, and
adds those of the new tokens.

Shapes: P pages, L tokens of a page, B sequences of a group, T new tokens, S tokens to attend to, K KV heads, D head
dim, C conv channels, W remembered conv inputs.
"""

from dataclasses import dataclass

import torch
from hybrid_moe_kernels.precision import wide
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KVPast:
    """One attention layer's view of the cache of B sequences with T new tokens each.

    kv_PL2KD    keys and values of all pages of the layer: [pages, tokens of a page, 2, KV heads, head dim]
    page_BT     page in which each new token is stored
    offset_BT   index of each new token in its page
    table_BP    page numbers of each sequence, from its start on
    lengths_B   number of tokens of each sequence, including the new ones
    length      the largest of `lengths_B`
    """

    kv_PL2KD: Tensor
    page_BT: Tensor
    offset_BT: Tensor
    table_BP: Tensor
    lengths_B: Tensor
    length: int

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Store the keys and values of the new tokens, each [sequences, new tokens, KV heads, head dim]."""
        new_BT2KD = torch.stack([k_BTKD, v_BTKD], dim=2)
        self.kv_PL2KD[self.page_BT, self.offset_BT] = new_BT2KD.to(self.kv_PL2KD.dtype)

    def extend(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values. Return the keys and the values of all tokens so far, each [B, S, K, D].

        B sequences, K KV heads, D head dim. S is the length of the longest sequence. The entries after the end of a
        shorter sequence are finite, and the causal mask hides them.
        """
        self.append(k_BTKD, v_BTKD)
        kv_BS2KD = self.kv_PL2KD[self.table_BP].flatten(1, 2)[:, : self.length]
        return kv_BS2KD[:, :, 0].to(k_BTKD.dtype), kv_BS2KD[:, :, 1].to(v_BTKD.dtype)


@dataclass(frozen=True, eq=False)
class KVRun:
    """One attention layer's view of a single sequence with consecutive pages.

    The layer reads all KV entries of the sequence as one slice, without a gather.

    kv_PL2KD           keys and values of the sequence, as a single page: [1, tokens of all its pages, 2, KV heads, head
                       dim]
    start              number of earlier tokens
    table_BP           the number of this single page: [[0]]
    lengths_B, length  number of tokens, including the new ones
    """

    kv_PL2KD: Tensor
    start: int
    table_BP: Tensor
    lengths_B: Tensor
    length: int

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Store the keys and values of the new tokens, each [sequences, new tokens, KV heads, head dim]."""
        torch.stack([k_BTKD, v_BTKD], dim=2, out=self.kv_PL2KD[:, self.start :])

    def extend(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values. Return the keys and the values of all tokens so far, each [B, S, K, D].

        B = 1 sequence of S tokens, K KV heads, D head dim.
        """
        self.append(k_BTKD, v_BTKD)
        return self.kv_PL2KD[:, :, 0], self.kv_PL2KD[:, :, 1]


@dataclass(frozen=True, eq=False)
class StatePast:
    """One recurrent layer's view of the cache of several sequences. The kernels change the two pools in place.

    conv_PWC   pool of the last inputs of the convolution: [pages, inputs, channels]
    ssm_P___   pool of recurrent states: [pages, …]; three further dimensions depend on the kind of the layer
    slots_B    index of each sequence in the first dimension of both pools
    """

    conv_PWC: Tensor
    ssm_P___: Tensor
    slots_B: Tensor

    @classmethod
    def zeros(
        cls, num_sequences: int, conv_shape: tuple[int, ...], ssm_shape: tuple[int, ...], like: Tensor
    ) -> "StatePast":
        """Return a view of `num_sequences` new sequences, whose conv inputs and recurrent states are zero.

        The view has pools of its own, so the model can run without a cache.

        conv_shape, ssm_shape   shapes of one sequence's conv inputs and of its recurrent state
        like                    a tensor: the new pools are on its device, and the conv inputs have its dtype
        """
        conv_BWC = like.new_zeros(num_sequences, *conv_shape)
        ssm_B___ = like.new_zeros(num_sequences, *ssm_shape, dtype=wide(like.dtype))
        return cls(conv_BWC, ssm_B___, torch.arange(num_sequences, device=like.device))

    @classmethod
    def joined(cls, pasts: "list[StatePast]") -> "StatePast":
        """Join one layer's views of several groups of sequences into one view. All views must use the same pools."""
        if len(pasts) == 1:
            return pasts[0]
        return cls(pasts[0].conv_PWC, pasts[0].ssm_P___, torch.cat([past.slots_B for past in pasts]))


Past = KVPast | KVRun | StatePast
