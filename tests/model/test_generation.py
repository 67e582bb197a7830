"""Decoding: chunked prefill, ragged prompts, continued prefixes and speculation all give the plain greedy tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_moe_ref import Batch, CacheExhausted, HybridCache, HybridMoE, preset
from hybrid_moe_ref.generation.greedy import pages_needed, prefill, stream
from hybrid_moe_ref.generation.speculative import Statistics, speculative_stream

CONFIG = replace(preset("tiny"), num_experts=16, num_experts_per_tok=3, vocab_size=64, num_mtp_layers=1)


@pytest.fixture(scope="module")
def model() -> HybridMoE:
    return HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(5)


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed))


def is_greedy(model: HybridMoE, prompt: Tensor, new: Tensor) -> bool:
    """By recomputing everything without a cache."""
    logits = model(torch.cat([prompt, new])[None])[0, len(prompt) - 1 : -1]
    return torch.equal(logits.argmax(-1), new)


@pytest.mark.parametrize("chunk", [None, 5, 64, 1000])
def test_ragged_prompts_and_any_chunk_give_the_greedy_tokens(model: HybridMoE, chunk: int | None) -> None:
    prompts = [tokens(n, seed=n) for n in (1, 30, 95, 95)]
    got = model.generate(prompts, 6, prefill_chunk=chunk)
    assert all(is_greedy(model, prompt, new) for prompt, new in zip(prompts, got, strict=True))


@pytest.mark.parametrize("chunk", [13, 64, 100])
def test_chunked_prefill_equals_full_prefill_in_float32(chunk: int) -> None:
    small = HybridMoE(CONFIG, device="meta").init_weights(5)
    text, cache = tokens(170), HybridCache(CONFIG, pages_needed(small, [170]))
    sequence = cache.allocate()
    parts = [small.step(part, Batch.of([(sequence, len(part))]), cache) for part in text.split(chunk)]
    want = small(text[None])[0]
    error = (small.logits(torch.cat(parts)) - want).norm() / want.norm()
    assert error <= 1e-5, f"chunk {chunk}: {error:.1e}"


def test_each_sequence_ends_at_a_token_that_ends_texts(model: HybridMoE) -> None:
    prompts = [tokens(n, seed=n) for n in (3, 30, 95)]
    whole = model.generate(prompts, 12)
    stops = sorted({int(whole[0, 2]), int(whole[1, 5])})
    got = model.generate(prompts, 12, stop_ids=stops)
    firsts = [next((i for i, token in enumerate(row.tolist()) if token in stops), 11) for row in whole]
    assert got.shape == (3, max(firsts) + 1)
    for row, old, first in zip(got, whole, firsts, strict=True):
        assert torch.equal(row[: first + 1], old[: first + 1])
        assert (row[first:] == row[first]).all()
    assert model.generate(prompts[:1], 12, stop_ids=stops).shape[1] == firsts[0] + 1
    model.stop_ids = tuple(stops)
    try:
        assert torch.equal(model.generate(prompts, 12), got)
        drafted = list(speculative_stream(model, prompts[1], 12))
        assert drafted == got[1, : firsts[1] + 1].tolist()
        assert torch.equal(model.generate(prompts, 12, stop_ids=()), whole)
    finally:
        model.stop_ids = ()


def test_generation_needs_no_gradient(model: HybridMoE) -> None:
    model.requires_grad_(True)
    try:
        new = model.generate([tokens(5)], 3)
        assert not new.requires_grad and len(list(speculative_stream(model, tokens(5), 3))) == 3
    finally:
        model.requires_grad_(False)


def test_a_prefix_is_continued_in_two_ways(model: HybridMoE) -> None:
    prefix, ends = tokens(100), [tokens(9, seed=1), tokens(30, seed=2)]
    cache = HybridCache(CONFIG, 2 * pages_needed(model, [150]), dtype=torch.float64)
    first = cache.allocate()
    prefill(model, [prefix], [first], cache)
    second = cache.fork(first)
    assert second.length == 100
    got = prefill(model, ends, [first, second], cache)
    assert all(is_greedy(model, torch.cat([prefix, end]), new) for end, new in zip(ends, got[:, None], strict=True))
    cache.free(first)
    cache.free(second)
    assert cache.num_free_pages == cache.num_pages


def test_a_snapshot_takes_a_sequence_back(model: HybridMoE) -> None:
    cache = HybridCache(CONFIG, pages_needed(model, [200]), dtype=torch.float64)
    sequence, text = cache.allocate(), tokens(100)
    model.step(text[:60], Batch.of([(sequence, 60)]), cache)
    snapshot = cache.snapshot(sequence)
    model.step(tokens(50, seed=9), Batch.of([(sequence, 50)]), cache)
    cache.restore(sequence, snapshot)
    assert sequence.length == 60
    got = model.logits(model.step(text[60:], Batch.of([(sequence, 40)]), cache))
    torch.testing.assert_close(got, model(text[None])[0, 60:], rtol=1e-10, atol=1e-10)


class Oracle:
    """Knows the right tokens, and says a wrong one with probability `error`."""

    def __init__(self, right: Tensor, error: float, seed: int) -> None:
        self.right, self.error, self.said = right, error, 0
        self.random = torch.Generator().manual_seed(seed)

    def propose(self, tokens_T: Tensor, hidden_TH: Tensor, count: int) -> Tensor:
        assert len(tokens_T) == len(hidden_TH)
        self.said += len(tokens_T) if self.said else 1
        guess = self.right[self.said : self.said + count].clone()
        wrong = torch.rand(count, generator=self.random) < self.error
        return torch.where(wrong, (guess + 1) % 64, guess)


@pytest.mark.parametrize(
    ("num_drafts", "error"),
    [
        (1, 0.0),
        (5, 0.4),
        (1, 1.0),
        *(pytest.param(*both, marks=pytest.mark.full) for both in ((5, 0.0), (1, 0.4), (5, 1.0))),
    ],
)
def test_speculation_yields_the_greedy_tokens_whatever_is_drafted(
    model: HybridMoE, num_drafts: int, error: float
) -> None:
    prompt, count, statistics = tokens(40), 17, Statistics()
    want = model.generate(prompt[None], count)[0]
    drafter = Oracle(want, error, seed=num_drafts)
    got = list(speculative_stream(model, prompt, count, num_drafts=num_drafts, drafter=drafter, statistics=statistics))
    assert got == want.tolist()
    if error == 0:
        assert statistics.num_accepted == statistics.num_drafted
        assert statistics.num_steps == -(-(count - 1) // (num_drafts + 1))
    if error == 1:
        assert statistics.num_accepted == 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_speculation_with_the_mtp_layer_yields_the_greedy_tokens(model: HybridMoE, seed: int) -> None:
    prompt = tokens(30 + seed, seed)
    got = list(speculative_stream(model, prompt, 12))
    assert got == model.generate(prompt[None], 12)[0].tolist(), f"seed {seed}"


@pytest.mark.full
def test_in_float32_speculation_parts_from_greedy_only_where_two_tokens_tie(model: HybridMoE) -> None:
    small = HybridMoE(CONFIG, device="meta").init_weights(5)
    for seed in range(3):
        prompt = tokens(30 + seed, seed)
        want, got = small.generate(prompt[None], 12)[0].tolist(), list(speculative_stream(small, prompt, 12))
        parting = next((i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b), None)
        if parting is not None:
            logits = model(torch.cat([prompt, torch.tensor(want[:parting], dtype=torch.long)])[None])[0, -1]
            gap = float(logits[want[parting]] - logits[got[parting]]) / float(logits.norm())
            assert abs(gap) <= 1e-5, f"seed {seed}, token {parting}: {gap:.1e}"


def test_mtp_drafts_do_not_depend_on_how_its_input_is_cut(model: HybridMoE) -> None:
    """Its cache gives what one pass over everything gives."""
    from hybrid_moe_ref.generation.speculative import MTPDrafter

    text = tokens(50)
    hidden = model.step(text[:-1], Batch.dummy(49))
    whole = MTPDrafter(model, 60).propose(text[1:], hidden, 4)
    drafter = MTPDrafter(model, 60)
    drafter.propose(text[1:20], hidden[:19], 3)
    drafter.propose(text[20:21], hidden[19:20], 2)
    assert torch.equal(drafter.propose(text[21:], hidden[20:], 4), whole)


def test_mtp_weights_survive_a_checkpoint(model: HybridMoE, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = HybridMoE.from_pretrained(tmp_path)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(name.startswith("mtp.layers.0.mlp.experts.") for name, _ in model.named_parameters())


def test_bad_requests_are_refused_before_the_first_step(model: HybridMoE) -> None:
    prompt = tokens(100)
    with pytest.raises(ValueError, match="at least 1 prompt is needed, got 0"):
        stream(model, [], 3)
    with pytest.raises(ValueError, match=r"prompt 1: must be a row of at least 1 token, but has shape \(0,\)"):
        stream(model, [prompt, prompt[:0]], 3)
    with pytest.raises(ValueError, match="token id 64 is outside the vocabulary of 64"):
        stream(model, [torch.tensor([64])], 3)
    with pytest.raises(ValueError, match="prefill_chunk: 0 is less than 1"):
        stream(model, [prompt], 3, prefill_chunk=0)
    with pytest.raises(ValueError, match="num_drafts: 0 is less than 1"):
        speculative_stream(model, prompt, 3, num_drafts=0)
    bare = HybridMoE(replace(CONFIG, num_mtp_layers=0), device="meta")
    with pytest.raises(ValueError, match="no MTP layer"):
        speculative_stream(bare, prompt, 3)


def test_token_ids_are_looked_at_before_they_go_to_a_device() -> None:
    """Where the look would cost, and a bad id would end the process; the meta device stands for such a one."""
    elsewhere, bad = HybridMoE(CONFIG, device="meta"), torch.tensor([1, 64])
    for call in (
        lambda: elsewhere(bad[None]),
        lambda: stream(elsewhere, [bad], 3),
        lambda: speculative_stream(elsewhere, bad, 3),
    ):
        with pytest.raises(ValueError, match="token id 64 is outside the vocabulary of 64"):
            call()


def test_a_prompt_longer_than_the_cache_is_refused_and_the_cache_stays_usable(model: HybridMoE) -> None:
    cache = HybridCache(CONFIG, pages_needed(model, [100]), dtype=torch.float64)
    free = cache.num_free_pages
    needed = pages_needed(model, [400 + 2])
    text = rf"generation for 1 prompts of up to 400 \+ 3 tokens needs {needed} pages, but only {free} are free"
    with pytest.raises(CacheExhausted, match=text):
        stream(model, [tokens(400)], 3, cache=cache)
    assert model.generate([tokens(50)], 3, cache=cache).shape == (1, 3)
    assert cache.num_free_pages == free


def test_an_abandoned_stream_gives_its_pages_back(model: HybridMoE) -> None:
    cache = HybridCache(CONFIG, pages_needed(model, [100]), dtype=torch.float64)
    running = stream(model, [tokens(50)], 9, cache=cache)
    next(iter(running))
    assert cache.num_free_pages < cache.num_pages
    running.close()  # type: ignore[attr-defined]
    assert cache.num_free_pages == cache.num_pages
