"""The table on the device says what the lists of pages say, whatever sequences come, grow and go."""

from __future__ import annotations

import random

import pytest
import torch

from hybrid_moe_ref.cache.page_table import FIRST_SIZE, PageTable


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_the_pages_of_their_sequences_and_repeat_the_last_one(seed):
    draw, table = random.Random(seed), PageTable(2, 3, torch.device("cpu"))
    rows: dict[int, tuple[list[int], list[list[int]]]] = {}
    for step in range(60):
        action = draw.choice(("add", "extend", "extend", "extend", "remove"))
        # What grows inside inference mode has to be written to outside of it too.
        with torch.inference_mode(draw.random() < 0.5):
            if action == "add" or not rows:
                slots = [draw.randrange(1000) for _ in range(3)]
                rows[table.add(slots)] = slots, [[], []]
            elif action == "extend":
                row = draw.choice(list(rows))
                new = [[draw.randrange(1000) for _ in range(1 + step % 4)] for _ in range(2)]
                table.extend(row, len(rows[row][1][0]), new)
                for pages, more in zip(rows[row][1], new, strict=True):
                    pages.extend(more)
            else:
                row = draw.choice(list(rows))
                del rows[row]
                table.remove(row)
        row_B = torch.tensor(list(rows), dtype=torch.long)
        filled = [row for row, (_, pages) in rows.items() if pages[0]]
        width = max((len(rows[row][1][0]) for row in filled), default=0)
        for group in range(3):
            assert table.slots(group, row_B).tolist() == [slots[group] for slots, _ in rows.values()], f"seed {seed}"
        for group in range(2):
            want = [(pages := rows[row][1][group]) + pages[-1:] * (width - len(pages)) for row in filled]
            assert table.pages(group, torch.tensor(filled, dtype=torch.long), width).tolist() == want, f"seed {seed}"


def test_a_table_grows_in_both_directions_and_uses_rows_again():
    table = PageTable(1, 0, torch.device("cpu"))
    rows = [table.add([]) for _ in range(3 * FIRST_SIZE)]
    assert sorted(rows) == list(range(3 * FIRST_SIZE))
    table.extend(rows[0], 0, [list(range(5 * FIRST_SIZE))])
    assert table.pages(0, torch.tensor(rows[:1]), 5 * FIRST_SIZE).tolist() == [list(range(5 * FIRST_SIZE))]
    table.remove(rows[5])
    assert table.add([]) == rows[5]
