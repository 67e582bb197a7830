"""The page numbers of all live sequences, kept on the device: one row for each sequence.

A row is written only when its sequence takes pages. Without this table, each step would send all page numbers to the
device for every layer group.

Shapes: G layer groups of a kind, R rows, W pages of a row, B sequences of a step.
"""

import torch
from torch import Tensor

FIRST_SIZE = 8


class PageTable:
    """The page numbers of all sequences on the device, with one row for each sequence.

    Layers of one kind form groups that share page numbers. For a group of attention layers, a row has the numbers of
    the sequence's pages. For a group of recurrent layers, it has the number of the page with the sequence's states (the
    slot).

    A row repeats its last page number up to the width of the table, because a step reads equally wide rows for
    sequences of different lengths. The KV entries of the repeated page are finite, and attention masks them.

    num_attention, num_recurrent: number of groups of attention layers, and of recurrent layers
    """

    def __init__(self, num_attention: int, num_recurrent: int, device: torch.device) -> None:
        self._page_GRW = torch.zeros(num_attention, FIRST_SIZE, FIRST_SIZE, dtype=torch.long, device=device)
        self._slot_GR = torch.zeros(num_recurrent, FIRST_SIZE, dtype=torch.long, device=device)
        self._free = list(reversed(range(FIRST_SIZE)))

    def add(self, slots_G: list[int]) -> int:
        """Add a row for a new sequence, which has no KV pages yet. Return the index of the row.

        slots_G: for each group of recurrent layers (layers that share page numbers), the page that holds the states of
        the sequence
        """
        if not self._free:
            num_rows = self._slot_GR.shape[1]
            self._free = list(reversed(range(num_rows, 2 * num_rows)))
            self._page_GRW = _joined(self._page_GRW, torch.zeros_like(self._page_GRW), dim=1)
            self._slot_GR = _joined(self._slot_GR, torch.zeros_like(self._slot_GR), dim=1)
        row = self._free.pop()
        self._slot_GR[:, row] = torch.tensor(slots_G, dtype=torch.long, device=self._slot_GR.device)
        return row

    def extend(self, row: int, start: int, pages: list[list[int]]) -> None:
        """Write new page numbers into a row, from index `start` on.

        pages: for each group of attention layers (layers that share page numbers), the new page numbers; all groups
        have equally many
        """
        new_GW = torch.tensor(pages, dtype=torch.long, device=self._page_GRW.device)
        end = start + new_GW.shape[1]
        while end > self._page_GRW.shape[2]:
            self._page_GRW = _joined(self._page_GRW, self._page_GRW[:, :, -1:].expand_as(self._page_GRW), dim=2)
        self._page_GRW[:, row, start:end] = new_GW
        self._page_GRW[:, row, end:] = new_GW[:, -1:]

    def remove(self, row: int) -> None:
        """Free a row, so that `add` can use it for another sequence."""
        self._free.append(row)

    def pages(self, group: int, rows_B: Tensor, width: int) -> Tensor:
        """Return, for each of B sequences, its first `width` page numbers in one group of attention layers: [B, width].

        group   index of the group (layers that share page numbers) among the groups of attention layers
        rows_B  the row of each sequence
        """
        return self._page_GRW[group, rows_B, :width]

    def slots(self, group: int, rows_B: Tensor) -> Tensor:
        """Return, for each of B sequences, the page with its states for one group of recurrent layers: [B].

        group   index of the group (layers that share page numbers) among the groups of recurrent layers
        rows_B  the row of each sequence
        """
        return self._slot_GR[group, rows_B]


@torch.inference_mode(False)
def _joined(x: Tensor, more: Tensor, dim: int) -> Tensor:
    """Concatenate two tensors of the same shape. The result can be written to inside and outside of inference mode."""
    joined = x.new_empty([*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :]])
    joined.narrow(dim, 0, x.shape[dim]).copy_(x)
    joined.narrow(dim, x.shape[dim], x.shape[dim]).copy_(more)
    return joined
