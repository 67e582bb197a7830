"""The whole model: what the cache gives equals recomputation, and weights do not depend on how they are
held."""

import pytest
import torch
from torch import Tensor

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig

SMALL = ModelConfig(
    layer_pattern="GMAG",
    vocab_size=97,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_state_size=8,
    mamba_num_groups=2,
    num_experts=16,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)


def build(dtype: torch.dtype = torch.float32, config: ModelConfig = SMALL) -> HybridMoE:
    return HybridMoE(config, device="meta", dtype=dtype).init_weights(seed=1)


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_prefill_and_decode_equal_recomputation(dtype: torch.dtype, tolerance: float) -> None:
    model, B, T, prompt = build(dtype), 3, 90, 67
    x = tokens(B, T)
    want = model(x)
    cache = HybridCache(SMALL, B * 12, dtype=dtype)
    sequences = [cache.allocate() for _ in range(B)]
    batch = Batch.of([(s, prompt) for s in sequences])
    got = [model.logits(model.step(x[:, :prompt].flatten(), batch, cache)).view(B, prompt, -1)]
    for t in range(prompt, T):
        batch = Batch.of([(s, 1) for s in sequences])
        got.append(model.logits(model.step(x[:, t], batch, cache))[:, None])
    assert error(torch.cat(got, 1), want) <= tolerance


@pytest.mark.parametrize("seed", range(4))
def test_ragged_steps_equal_recomputation(seed: int) -> None:
    """Sequences of different lengths, cut into random pieces, mixed with each other in every step."""
    model = build(torch.float64)
    r = torch.Generator().manual_seed(seed)
    lengths = [1, 5, 40, 66, 66]
    texts = [tokens(1, n, seed=10 + n)[0] for n in lengths]
    cache = HybridCache(SMALL, 60, dtype=torch.float64)
    sequences = [cache.allocate() for _ in texts]
    got: list[list[Tensor]] = [[] for _ in texts]
    while any(s.length < len(text) for s, text in zip(sequences, texts, strict=True)):
        pieces = []
        for i, (s, text) in enumerate(zip(sequences, texts, strict=True)):
            left = len(text) - s.length
            if left and torch.rand((), generator=r) < 0.8:
                pieces.append((i, min(left, int(torch.randint(1, 30, (), generator=r)))))
        batch = Batch.of([(sequences[i], count) for i, count in pieces])
        ids = [texts[i][sequences[i].length : sequences[i].length + count] for i, count in pieces]
        hidden = model.step(torch.cat([*ids, texts[0][:0]]), batch, cache)
        for (i, _), part in zip(pieces, hidden.split([count for _, count in pieces]), strict=True):
            got[i].append(part)
    for i, text in enumerate(texts):
        want = model(text[None])[0]
        assert error(model.logits(torch.cat(got[i])), want) <= 1e-12, f"sequence {i}, seed {seed}"


def test_generate_equals_greedy_recomputation_and_is_not_constant() -> None:
    model = build(torch.float64)
    prompt = tokens(3, 11)
    new = model.generate(prompt, 20)
    assert new.shape == (3, 20)
    full = model(torch.cat([prompt, new], 1))[:, 10:-1]
    assert torch.equal(full.argmax(-1), new)
    assert all(len(set(row.tolist())) > 5 for row in new)


def test_zero_token_step_and_dummy_step_leave_the_cache_alone() -> None:
    model, cache = build(), HybridCache(SMALL, 20)
    sequence = cache.allocate()
    model.step(tokens(1, 5)[0], Batch.of([(sequence, 5)]), cache)
    before = [buffer.clone() for buffer in cache.buffers]
    assert model.step(tokens(1, 0)[0], Batch.of([]), cache).shape == (0, 32)
    assert model.step(tokens(1, 3)[0], Batch.dummy(3), cache).shape == (3, 32)
    assert model.step(tokens(1, 3)[0], Batch.dummy(3)).shape == (3, 32)
    assert sequence.length == 5
    assert all(torch.equal(a, b) for a, b in zip(before, cache.buffers, strict=True))


def test_weights_are_the_same_for_a_shard_a_dtype_and_a_wrapper() -> None:
    whole = build()
    part = HybridMoE(SMALL, device="meta")
    for block in part.model.layers:
        block.mlp.experts = torch.nn.Sequential(block.mlp.experts.shard(4, 8))
    part.init_weights(seed=1)
    for a, b in zip(whole.model.layers, part.model.layers, strict=True):
        assert torch.equal(a.mlp.experts.gate_up_proj[4:12], b.mlp.experts[0].gate_up_proj)
        assert torch.equal(a.mlp.experts.down_proj[4:12], b.mlp.experts[0].down_proj)
        assert torch.equal(a.mlp.gate.weight, b.mlp.gate.weight)
    double, half = build(torch.float64), build(torch.bfloat16)
    for (name, a), b, c in zip(whole.named_parameters(), double.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.double(), b) and torch.equal(a.bfloat16(), c), name
        assert a.isfinite().all(), name


def test_activations_keep_their_size() -> None:
    logits = build()(tokens(2, 50))
    assert 0.5 < float(logits.std()) < 2


def test_tied_embeddings_share_one_parameter() -> None:
    config = ModelConfig.from_mapping(SMALL.to_mapping() | {"tie_word_embeddings": True})
    model = build(config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(tokens(1, 3)).shape == (1, 3, 97)


def test_dense_model_and_every_single_kind() -> None:
    for pattern in ("G", "A", "M"):
        change = {"layer_pattern": pattern, "num_experts": 0, "intermediate_size": 40}
        model = build(torch.float64, ModelConfig.from_mapping(SMALL.to_mapping() | change))
        new = model.generate(tokens(2, 6), 5)
        full = model(torch.cat([tokens(2, 6), new], 1))[:, 5:-1]
        assert torch.equal(full.argmax(-1), new), pattern


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m(torch.tensor([[1, 97]])), "token id 97 is outside the vocabulary of 97"),
        (
            lambda m: m(torch.tensor([[1.0]])),
            r"token ids have dtype torch\.float32, but must be torch\.int64 or torch\.int32",
        ),
        (lambda m: m(torch.tensor([[-1, 7]])), "token id -1 is outside the vocabulary of 97"),
        (lambda m: m(torch.zeros(0, 4, dtype=torch.long)), r"B and T at least 1, but have shape \(0, 4\)"),
        (
            lambda m: m.generate(torch.zeros(2, 0, dtype=torch.long), 1),
            r"prompt 0: must be a row of at least 1 token, but has shape \(0,\)",
        ),
        (lambda m: m.generate(torch.zeros(2, 2, dtype=torch.long), 0), "max_new_tokens: 0 is less than 1"),
        (
            lambda m: m.step(torch.zeros(2, dtype=torch.long), Batch.dummy(3)),
            r"the batch has 3 tokens, but the tokens have shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_a_clear_error(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(build())
