"""Agreement with code that others wrote: transformers' models and mixers, fla's and mamba-ssm's plain recurrences.

Both sides compute in float64 throughout, so that what differs is the order of sums: 1e-11 leaves no room for another
constant, cast or formula. Every configuration is drawn from a seed that the assertion names. An oracle that is not
installed is a skip that names it. Weights travel as checkpoints, so the formats are tested on the way: what we save,
transformers loads; what it saves again, we load bit for bit.
"""

import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig
from hybrid_moe_ref.checkpoint import describe
from hybrid_moe_ref.checkpoint.families import to_json
from hybrid_moe_ref.commands.comparison import float64_throughout, judge_exact, judge_rounding, their_logits
from hybrid_moe_ref.generation.greedy import pages_needed

FAMILIES = {
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
NUM_CONFIGS = 12
SEEDS = [pytest.param(seed, marks=pytest.mark.full if seed else ()) for seed in range(NUM_CONFIGS)]
"""Of each family twelve configurations are compared, the first also by the default suite."""

PINNED: dict[int, dict[str, object]] = {
    9: {"layer_pattern": "GA", "num_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 6,
        "num_attention_heads": 6, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
    10: {"layer_pattern": "AG", "num_experts": 64, "num_experts_per_tok": 22, "num_key_value_heads": 8,
         "num_attention_heads": 24},
    11: {"layer_pattern": "GAG", "num_experts": 512, "num_experts_per_tok": 10, "num_key_value_heads": 7,
         "num_attention_heads": 14, "linear_conv_kernel_dim": 4},
}  # fmt: skip
"""Sizes that the draws of these seeds have in every family, as no draw is sure to."""


@pytest.fixture(scope="module")
def transformers():
    # transformers prefers fla where it can be imported, and fla without a GPU fails at the first call.
    sys.modules.setdefault("fla", None)
    return pytest.importorskip("transformers")


def draw_config(seed: int, family: str) -> ModelConfig:
    """Sizes that real models avoid: odd head ratios, one expert, all experts, short filters."""
    r = random.Random(f"{family} {seed}")
    kv_heads, key_heads = r.choice([1, 2, 3, 4, 5, 8]), r.choice([1, 2, 3, 4])
    num_experts = r.choice([1, 2, 7, 16, 64, 128, 512])
    sizes = {
        "layer_pattern": "".join(r.choice(["GGGA", "GA", "AG", "GAAG", "A", "G"]) for _ in range(r.choice([1, 2]))),
        "vocab_size": r.choice([33, 96, 250]),
        "hidden_size": r.choice([32, 40, 64]),
        "num_attention_heads": kv_heads * r.choice([1, 2, 3, 5]),
        "num_key_value_heads": kv_heads,
        "head_dim": r.choice([8, 16, 24, 32]),
        "partial_rotary_factor": r.choice([0.25, 0.5, 1.0]),
        "rope_theta": r.choice([1e4, 1e7]),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * r.choice([1, 2, 3, 4]),
        "linear_key_head_dim": r.choice([8, 16, 24]),
        "linear_value_head_dim": r.choice([8, 16, 32]),
        "linear_conv_kernel_dim": r.choice([2, 3, 4]),
        "num_experts": 0 if family == "qwen3_5_text" else num_experts,
        "num_experts_per_tok": min(num_experts, r.choice([1, 2, 5, 10, 22])),
        "moe_intermediate_size": r.choice([8, 24, 32]),
        "shared_expert_intermediate_size": r.choice([8, 20, 48]),
        "intermediate_size": r.choice([24, 64]),
        "tie_word_embeddings": r.random() < 0.5,
        "rms_norm_eps": r.choice([1e-6, 1e-5]),
    }
    pinned = PINNED.get(seed, {})
    if family == "qwen3_5_text":
        pinned = {key: value for key, value in pinned.items() if "expert" not in key}
    return ModelConfig.from_mapping(sizes | pinned)


def draw_tokens(seed: int, config: ModelConfig) -> Tensor:
    r = random.Random(seed)
    shape = (r.choice([1, 2, 3]), r.choice([1, 2, 31, 64, 65, 100, 150]))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_the_draws_cover_what_was_promised() -> None:
    """Each family on its own where a size is named, and all together."""
    drawn = {family: [draw_config(seed, family) for seed in range(NUM_CONFIGS)] for family in FAMILIES}
    for family, configs in drawn.items():
        assert {c.linear_conv_kernel_dim for c in configs} == {2, 3, 4}, family
        assert {c.tie_word_embeddings for c in configs} == {False, True}, family
        assert any(c.num_key_value_heads == 8 and "A" in c.layer_pattern for c in configs), family
        if family != "qwen3_5_text":
            sizes = {(c.num_experts, c.num_experts_per_tok, c.linear_conv_kernel_dim) for c in configs}
            assert (512, 10, 4) in sizes and {1, 22} <= {top_k for _, top_k, _ in sizes}, family
            assert 1 in {num_experts for num_experts, _, _ in sizes}, family
            assert any(c.shared_expert_intermediate_size != c.moe_intermediate_size for c in configs), family
    everything = [c for configs in drawn.values() for c in configs]
    assert {c.num_key_value_heads for c in everything if "A" in c.layer_pattern} == set(range(1, 9))
    ratios = {c.linear_num_value_heads // c.linear_num_key_heads for c in everything if "G" in c.layer_pattern}
    assert ratios == {1, 2, 3, 4}
    assert {3, 5} <= {c.num_attention_heads // c.num_key_value_heads for c in everything if "A" in c.layer_pattern}
    lengths = {draw_tokens(seed, everything[0]).shape[1] for seed in range(NUM_CONFIGS)}
    assert any(length > 64 and length % 64 for length in lengths)


def load_theirs(transformers, family: str, folder: Path, dtype: torch.dtype):
    model = getattr(transformers, FAMILIES[family])
    return model.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def cached_logits(model: HybridMoE, tokens_BT: Tensor, seed: int) -> Tensor:
    """[B, T, V] by prompts of different lengths in one batch, cut into chunks, and single tokens after them."""
    r, (B, T) = random.Random(seed), tokens_BT.shape
    cache = HybridCache(model.config, pages_needed(model, [T] * B), dtype=model.dtype)
    sequences, parts = [cache.allocate() for _ in range(B)], [[] for _ in range(B)]
    num_single = [r.randint(0, min(5, T - 1)) for _ in range(B)]
    while any(sequence.length < T for sequence in sequences):
        counts = []
        for sequence, single in zip(sequences, num_single, strict=True):
            left = T - single - sequence.length
            counts.append(r.randint(1, left) if left > 0 else min(1, T - sequence.length))
        rows = [b for b in range(B) if counts[b]]
        ids = [tokens_BT[b, sequences[b].length : sequences[b].length + counts[b]] for b in rows]
        logits_NV = model.logits(model.step(torch.cat(ids), Batch.of([(sequences[b], counts[b]) for b in rows]), cache))
        for b, logits in zip(rows, logits_NV.split([counts[b] for b in rows]), strict=True):
            parts[b].append(logits)
    return torch.stack([torch.cat(part) for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_checkpoints_agree_with_transformers(transformers, family: str, seed: int, tmp_path: Path) -> None:
    config = draw_config(seed, family)
    saved = HybridMoE(config, device="meta").init_weights(seed)
    saved.save_pretrained(tmp_path / "ours", family=family)
    ours = HybridMoE.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    tokens = draw_tokens(seed, config)
    want = their_logits(tmp_path / "ours", torch.float64, tokens)
    for how, got in (("whole", ours(tokens)), ("cached", cached_logits(ours, tokens, seed))):
        verdict = judge_exact(got, want)
        assert verdict["agrees"], f"{how}: {verdict}: {family}, seed {seed}, {config}"

    load_theirs(transformers, family, tmp_path / "ours", torch.float32).save_pretrained(tmp_path / "theirs")
    again = HybridMoE.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    for (name, a), b in zip(saved.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: {family}, seed {seed}, {config}"


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next"])
def test_the_comparison_sees_an_epsilon_that_is_one_percent_off(transformers, family: str, tmp_path: Path) -> None:
    """In float32 it would be lost in rounding."""
    config = replace(draw_config(0, family), rms_norm_eps=1e-6)
    HybridMoE(config, device="meta").init_weights(0).save_pretrained(tmp_path, family=family)
    tokens = draw_tokens(0, config)
    ours = HybridMoE.from_pretrained(tmp_path, dtype=torch.float64)
    want = their_logits(tmp_path, torch.float64, tokens)
    assert judge_exact(ours(tokens), want)["agrees"]
    ours.model.norm.eps *= 1.01
    verdict = judge_exact(ours(tokens), want)
    assert not verdict["agrees"] and verdict["largest_error_in_float64"] < 1e-7, verdict


@pytest.mark.parametrize(
    ("family", "num_seeds"),
    [("qwen3_next", 4), *(pytest.param(family, 16, marks=pytest.mark.full) for family in FAMILIES)],
)
def test_bfloat16_is_as_close_to_the_truth_as_transformers(
    transformers, family: str, num_seeds: int, tmp_path: Path
) -> None:
    """bfloat16 changes a third of the routings, so two bfloat16 models are not compared; each is with float64 on the
    same weights, over several configurations together, as a single one is luck: its ratio may be 0.8 or 1.25."""
    ratios, ours_squared, theirs_squared = [], 0.0, 0.0
    for seed in range(num_seeds):
        sizes = {"layer_pattern": "GGGA", "hidden_size": 64, "vocab_size": 250}
        if family != "qwen3_5_text":
            sizes |= {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 32}
        config = ModelConfig.from_mapping(draw_config(seed, family).to_mapping() | sizes)
        half = HybridMoE(config, device="meta", dtype=torch.bfloat16).init_weights(seed)
        folder = tmp_path / str(seed)
        half.save_pretrained(folder, family=family)
        tokens = torch.randint(250, (2, 150), generator=torch.Generator().manual_seed(seed))
        truth, theirs = (their_logits(folder, dtype, tokens) for dtype in (torch.float64, torch.bfloat16))
        ours = half(tokens)
        ours_squared += float((ours - truth).square().mean() / truth.square().mean())
        theirs_squared += float((theirs - truth).square().mean() / truth.square().mean())
        one = judge_rounding(ours, theirs, truth)
        ratios.append(round(one["median_error"] / one["their_median_error"], 3))
        assert one["agrees"], f"{family}, seed {seed}: {one}"
    text = f"{family}: the median token's error over transformers', by seed: {ratios}"
    assert ours_squared**0.5 <= 1.2 * theirs_squared**0.5, text
    assert statistics.median(ratios) <= 1.2, text


@pytest.mark.parametrize("kind", ["Qwen3_5Moe", "Qwen3_5"])
def test_the_text_of_multimodal_checkpoints_agrees_with_transformers(transformers, kind: str, tmp_path: Path) -> None:
    family = "qwen3_5_moe_text" if kind == "Qwen3_5Moe" else "qwen3_5_text"
    sizes = {"layer_pattern": "GA", "num_experts_per_tok": 3, "vocab_size": 96, "hidden_size": 32}
    config = ModelConfig.from_mapping(draw_config(3, family).to_mapping() | sizes)
    small = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4, "num_position_embeddings": 16}
    marks = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    theirs = (
        getattr(transformers, f"{kind}ForConditionalGeneration")
        ._from_config(
            getattr(transformers, f"{kind}Config")(
                text_config=to_json(config, family, "float32"),
                vision_config={"depth": 1, "out_hidden_size": config.hidden_size} | small,
                tie_word_embeddings=config.tie_word_embeddings,
                **marks,
            ),
            experts_implementation="eager",
        )
        .eval()
    )
    r = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms that start at nothing show nothing
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=r))
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(90, (2, 67), generator=r)
    with torch.no_grad(), float64_throughout(theirs.double()):
        want = theirs(input_ids=tokens, use_cache=False).logits
    ours = HybridMoE.from_pretrained(tmp_path, dtype=torch.float64)
    assert describe(tmp_path, ours)["skipped"].keys() == {"model.visual.*"}
    verdict = judge_exact(ours(tokens), want)
    assert verdict["agrees"], verdict


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_the_draft_layer_is_transformers_decoder_layer_behind_its_projection(
    transformers, family: str, seed: int, tmp_path: Path
) -> None:
    """transformers drops `mtp.*`, but has its parts: fc of the two norms' outputs, one layer, a norm, the head."""
    sizes = {"layer_pattern": "A", "num_mtp_layers": 1}
    config = ModelConfig.from_mapping(draw_config(seed, family).to_mapping() | sizes)
    ours = HybridMoE(config, device="meta", dtype=torch.float64).init_weights(seed)
    ours.save_pretrained(tmp_path, family=family)
    theirs = load_theirs(transformers, family, tmp_path, torch.float64)
    layer, mtp = theirs.model.layers[0], ours.mtp
    layer.load_state_dict(mtp.layers[0].state_dict(), strict=True)

    def normed(norm: torch.nn.Module, x: Tensor) -> Tensor:
        like = type(theirs.model.norm)(config.hidden_size, config.rms_norm_eps).double()
        like.load_state_dict(norm.state_dict(), strict=True)
        return like(x)

    B, T, r = 2, 67, torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (B, T), generator=r)
    hidden = torch.randn(B, T, config.hidden_size, generator=r, dtype=torch.float64)
    with torch.no_grad(), float64_throughout(theirs):
        embedded = normed(mtp.pre_fc_norm_embedding, theirs.model.embed_tokens(tokens))
        x = torch.cat([embedded, normed(mtp.pre_fc_norm_hidden, hidden)], -1) @ mtp.fc.weight.T
        places = torch.arange(T).expand(B, T)
        x = layer(x, position_embeddings=theirs.model.rotary_emb(x, places), attention_mask=None, position_ids=places)
        want = theirs.lm_head(normed(mtp.norm, x))
    got = ours.logits(ours.draft(tokens.flatten(), hidden.flatten(0, 1), Batch.dense(B, T))).view_as(want)
    verdict = judge_exact(got, want)
    assert verdict["agrees"], f"{family}, seed {seed}: {verdict}: {config}"
