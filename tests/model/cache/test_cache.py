"""Pages: taken and given back exactly, exhausted without harm, never shared by two sequences."""

import dataclasses

import pytest
import torch

from hybrid_moe_ref import Batch, CacheExhausted, HybridCache, HybridMoE, preset
from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.config import ModelConfig

TINY = preset("tiny")
SMALL = ModelConfig.from_mapping(TINY.to_mapping() | {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64})


def test_layer_groups_are_of_one_kind_and_share_the_buffers() -> None:
    layout = page_layout(TINY)
    assert [(g.kind, g.layers) for g in layout.groups if g.kind != "G"] == [
        ("A", (3,)),
        ("A", (7,)),
        ("M", (4,)),
    ]
    assert sorted(layer for g in layout.groups for layer in g.layers) == list(range(8))
    big = page_layout(preset("qwen3.5-397b-a17b"))
    assert [len(g.layers) for g in big.groups] == [15, 15, 15, 15]
    assert big.pages_for(1) == 4 and big.pages_for(2096) == 4 and big.pages_for(2097) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_buffers_have_the_layouts_size(dtype: torch.dtype) -> None:
    cache = HybridCache(TINY, 3, dtype=dtype)
    ssm_itemsize = 8 if dtype == torch.float64 else 4
    layout = page_layout(TINY, dtype.itemsize, ssm_itemsize=ssm_itemsize)
    assert sum(b.numel() for b in cache.buffers) == 3 * layout.group_size * layout.page_bytes


def test_pages_are_taken_as_tokens_come_and_all_come_back() -> None:
    model = HybridMoE(SMALL, device="meta").init_weights(0)
    cache = HybridCache(SMALL, 20)
    tokens = cache.layout.tokens
    a, b = cache.allocate(), cache.allocate()
    assert cache.num_free_pages == 20 - 2 * 6  # five G layers and an M layer, one page each
    model.step(torch.zeros(tokens, dtype=torch.long), Batch.of([(a, tokens)]), cache)
    assert cache.num_free_pages == 6  # two A layers, one page each
    model.step(torch.zeros(2, dtype=torch.long), Batch.of([(a, 1), (b, 1)]), cache)
    assert cache.num_free_pages == 2
    taken = [page for s in (a, b) for pages in s.pages for page in pages]
    assert len(set(taken)) == len(taken) == 18
    cache.free(a)
    cache.free(b)
    assert cache.num_free_pages == 20


def test_exhaustion_names_both_numbers_and_harms_nothing() -> None:
    model = HybridMoE(SMALL, device="meta", dtype=torch.float64).init_weights(0)
    cache = HybridCache(SMALL, 9, dtype=torch.float64)
    tokens = cache.layout.tokens
    text = torch.randint(64, (tokens + 1,), generator=torch.Generator().manual_seed(1))
    want = model(text[None])[0]
    a = cache.allocate()
    with pytest.raises(CacheExhausted, match="a new sequence needs 6 pages, but only 3 are free"):
        cache.allocate()
    with pytest.raises(CacheExhausted, match=f"a step of {tokens + 1} tokens needs 4 pages, but only 3 are free"):
        model.step(text, Batch.of([(a, tokens + 1)]), cache)
    got = model.step(text[:tokens], Batch.of([(a, tokens)]), cache)
    torch.testing.assert_close(model.logits(got), want[:tokens], rtol=1e-9, atol=1e-9)
    with pytest.raises(CacheExhausted) as caught:
        model.step(text[tokens:], Batch.of([(a, 1)]), cache)
    assert (caught.value.needed, caught.value.free, a.length) == (2, 1, tokens)
    cache.free(a)
    assert cache.num_free_pages == 9


def test_a_freed_page_starts_clean_for_its_next_owner() -> None:
    """A page that held a recurrent state full of NaN must not reach a later sequence's attention."""
    model = HybridMoE(SMALL, device="meta").init_weights(0)
    cache = HybridCache(SMALL, 16)
    for buffer in cache.buffers:
        buffer.fill_(255)  # every float a NaN
    text = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    long, short = cache.allocate(), cache.allocate()
    model.step(text[0], Batch.of([(long, 40)]), cache)
    model.step(text[1, :3], Batch.of([(short, 3)]), cache)
    hidden = model.step(text[:, 3], Batch.of([(long, 1), (short, 1)]), cache)
    want = model(text[1:, :4])[0, -1]
    torch.testing.assert_close(model.logits(hidden)[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "dtype", "words"),
    [
        (
            {"num_key_value_heads": 1},
            torch.float32,
            "the cache was made for num_key_value_heads 1, but the model has num_key_value_heads 2",
        ),
        (
            {"layer_pattern": "GA"},
            torch.float32,
            "the cache was made for layer_pattern 'GA', but the model has layer_pattern 'GGGAMGGA'",
        ),
        ({}, torch.float64, "the cache has dtype torch.float64, but the model has torch.float32"),
    ],
)
def test_a_cache_of_another_model_is_refused(change: dict, dtype: torch.dtype, words: str) -> None:
    model = HybridMoE(SMALL, device="meta").init_weights(0)
    cache = HybridCache(dataclasses.replace(SMALL, **change), 40, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        model.step(torch.zeros(3, dtype=torch.long), Batch.of([(cache.allocate(), 3)]), cache)
    with pytest.raises(ValueError, match=words):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2, cache=cache)


def test_a_failed_step_leaves_the_cache_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refused id the sequence itself goes on; after a failure inside, it is freed and the others go on."""
    model = HybridMoE(SMALL, device="meta", dtype=torch.float64).init_weights(0)
    cache, text = (
        HybridCache(SMALL, 30, dtype=torch.float64),
        torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1)),
    )
    want = model(text)
    a, b = cache.allocate(), cache.allocate()
    model.step(text[:, :30].flatten(), Batch.of([(a, 30), (b, 30)]), cache)
    with pytest.raises(ValueError, match="token id 64 is outside"):
        model.step(torch.tensor([64]), Batch.of([(a, 1)]), cache)
    got = model.logits(model.step(text[0, 30:32], Batch.of([(a, 2)]), cache))
    torch.testing.assert_close(got, want[0, 30:32], rtol=1e-9, atol=1e-9)

    def fail(*args: object) -> None:
        raise RuntimeError("halfway")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="halfway"):
        broken.setattr(model.blocks[4].mixer, "forward", fail)
        model.step(text[0, 32:], Batch.of([(a, 8)]), cache)
    cache.free(a)
    got = model.logits(model.step(text[1, 30:], Batch.of([(b, 10)]), cache))
    torch.testing.assert_close(got, want[1, 30:], rtol=1e-9, atol=1e-9)
    again = cache.allocate()
    got = model.logits(model.step(text[0], Batch.of([(again, 40)]), cache))
    torch.testing.assert_close(got, want[0], rtol=1e-9, atol=1e-9)
    for sequence in (again, b):
        cache.free(sequence)
    assert cache.num_free_pages == cache.num_pages


def test_a_sequence_that_nobody_refers_to_gives_its_pages_back() -> None:
    cache = HybridCache(SMALL, 20)
    kept, dropped = cache.allocate(), cache.allocate()
    copy = cache.fork(dropped)
    assert cache.num_free_pages == 20 - 3 * 6
    del dropped, copy
    assert cache.num_free_pages == 20 - 6
    cache.free(kept)
    del kept
    assert cache.num_free_pages == 20 and sorted(cache._free) == list(range(20)), "each page came back once"


def test_misuse_is_a_clear_error() -> None:
    cache, other = HybridCache(SMALL, 20), HybridCache(SMALL, 20)
    model = HybridMoE(SMALL, device="meta").init_weights(0)
    a = cache.allocate()
    with pytest.raises(ValueError, match="belongs to a different cache"):
        other.free(a)
    with pytest.raises(ValueError, match="appears twice"):
        Batch.of([(a, 1), (a, 2)])
    with pytest.raises(ValueError, match="sequence 0 of the batch has 0 new tokens"):
        Batch.of([(a, 0)])
    batch, one = Batch.of([(a, 1)]), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="was given no cache"):
        model.step(one, batch)
    model.step(one, batch, cache)
    with pytest.raises(ValueError, match="built before the last step of its sequences"):
        model.step(one, batch, cache)
    cache.free(a)
    with pytest.raises(ValueError, match="was freed"):
        cache.free(a)
    with pytest.raises(ValueError, match="was freed"):
        model.step(one, Batch.of([(a, 1)]), cache)
    with pytest.raises(ValueError, match="num_pages is 0, but must be at least 1"):
        HybridCache(SMALL, 0)
