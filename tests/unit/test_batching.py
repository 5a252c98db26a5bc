"""Packing and masks: every token once, nothing lost, equal microbatch counts, exact skipping."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.batching import (
    Packing,
    build_document_minibatch,
    build_microbatch,
    pack,
    samples_to_train,
    set_advantages,
)
from megatron_zero.checks import round_up
from megatron_zero.convert.cost import attention_break_even
from megatron_zero.convert.families import mapping_for
from megatron_zero.types import GlobalBatch, Minibatch, TrainSample
from tests import families


def sample(prompt: int, response: int, *, advantage: float = 1.0, engine: int = 0) -> TrainSample:
    return TrainSample(
        token_ids=tuple(range(10, 10 + prompt + response)),
        prompt_length=prompt,
        rollout_logprobs=tuple(-float(i + 1) for i in range(response)),
        advantage=advantage,
        engine_index=engine,
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    num_ranks=st.integers(1, 5),
    max_tokens=st.integers(50, 200),
)
def test_pack_places_every_sequence_once_within_the_budget(lengths, num_ranks, max_tokens) -> None:
    plan = pack(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    assert len(plan) == num_ranks
    assert len({len(bins) for bins in plan}) == 1  # the pipeline schedule needs equal counts
    placed = [i for bins in plan for bin_ in bins for i in bin_]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= max_tokens for bins in plan for bin_ in bins)
    # balanced: ranks differ by no more than one longest sequence per microbatch
    loads = [sum(lengths[i] for bin_ in bins for i in bin_) for bins in plan]
    assert max(loads) - min(loads) <= max(lengths) * len(plan[0])


def realistic_lengths(num_samples: int, *, seed: int) -> list[int]:
    """Prompt and response lengths of a step as the paper's runs have them: long-tailed, cut."""
    rng = random.Random(seed)
    prompts = [rng.randint(60, 400) for _ in range(num_samples // 8)]
    return [
        prompts[i // 8] + min(int(rng.lognormvariate(6.3, 0.7)), 3000) for i in range(num_samples)
    ]


@pytest.mark.parametrize(("num_ranks", "alignment"), [(1, 1), (4, 8), (8, 16)])
def test_little_is_padded_and_budgets_are_filled(num_ranks: int, alignment: int) -> None:
    """1,024 responses into 16,384 tokens: what is computed for nothing, and what stays empty."""
    lengths = realistic_lengths(1024, seed=num_ranks)
    padded = [round_up(n, alignment) for n in lengths]
    plan = pack(padded, num_ranks=num_ranks, max_tokens=16384)
    assert sum(padded) / sum(lengths) - 1 <= 0.05
    num_microbatches = num_ranks * len(plan[0])
    fewest = num_ranks * -(-sum(padded) // (num_ranks * 16384))
    assert num_microbatches <= fewest + num_ranks
    filled = [sum(padded[i] for i in bin_) / 16384 for bins in plan for bin_ in bins]
    assert sum(filled) / len(filled) >= sum(padded) / (16384 * (fewest + num_ranks))


def test_cost_with_attention_is_balanced_over_ranks() -> None:
    """Long contexts, where a token of a long response costs several of a short one."""
    options = {"num_ranks": 8, "max_tokens": 131_072}
    spreads = []
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [min(int(rng.lognormvariate(8.5, 1.0)), 60_000) for _ in range(512)]
        by_cost = pack(lengths, **options, attention_break_even=20_000)
        plans = (by_cost, pack(lengths, **options))
        loads = [
            [sum(lengths[i] * (1 + lengths[i] / 20_000) for b in bins for i in b) for bins in plan]
            for plan in plans
        ]
        spreads.append([max(load) / (sum(load) / 8) - 1 for load in loads])
    by_cost, by_tokens = zip(*spreads, strict=True)
    assert max(by_cost) <= 0.05
    assert sum(by_cost) <= 0.2 * sum(by_tokens)


def test_pack_refuses_a_sequence_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch=10: must hold a sample of 11"):
        pack([3, 11], num_ranks=1, max_tokens=10)


def test_microbatch_by_hand() -> None:
    samples = [sample(2, 3, advantage=0.5), sample(1, 2, advantage=-1.0)]
    m = build_microbatch(samples, [1, 0], alignment=4, length_normalizer="response")
    #              sample 1: 10 11 12            sample 0: 10 11 12 13 14
    assert m.tokens.tolist() == [10, 11, 0, 0, 10, 11, 12, 13]
    assert m.labels.tolist() == [11, 12, 0, 0, 11, 12, 13, 14]
    assert m.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert m.cu_seqlens.tolist() == [0, 4, 8] and m.max_seqlen == 4
    assert m.loss_mask.tolist() == [True, True, False, False, False, True, True, True]
    third = pytest.approx(1 / 3, rel=1e-6)
    assert m.loss_weights.tolist() == [0.5, 0.5, 0, 0, 0, third, third, third]
    assert m.advantages.tolist() == [-1, -1, 0, 0, 0, 0.5, 0.5, 0.5]
    assert m.rollout_logprobs.tolist() == [-1, -2, 0, 0, 0, -1, -2, -3]
    assert m.sample_index == (1, 0)


def test_empty_microbatch_is_padding_that_counts_nothing() -> None:
    m = build_microbatch([], [], alignment=2)
    assert m.tokens.tolist() == [0, 0] and m.cu_seqlens.tolist() == [0, 2]
    assert not m.loss_mask.any() and not m.loss_weights.any()


def test_only_samples_with_a_gradient_are_needed_but_every_engine_stays_checked() -> None:
    samples = [
        sample(2, 9, advantage=0.0, engine=0),
        sample(2, 3, advantage=0.5, engine=0),
        sample(2, 8, advantage=0.0, engine=1),
        sample(2, 4, advantage=0.0, engine=1),
        sample(2, 5, advantage=0.0, engine=0),
    ]
    keep = {"skip_zero_advantage": True}
    assert samples_to_train(samples, min_samples=1, **keep) == [1, 3]
    assert samples_to_train(samples, min_samples=3, **keep) == [1, 3, 4]
    assert samples_to_train(samples, min_samples=99, **keep) == [0, 1, 2, 3, 4]
    assert samples_to_train(samples, min_samples=1, skip_zero_advantage=False) == [0, 1, 2, 3, 4]


def test_set_advantages_reaches_exactly_the_samples_tokens() -> None:
    samples = [sample(2, 3), sample(1, 2), sample(3, 1)]
    m = build_microbatch(samples, [2, 0])
    batch = GlobalBatch(minibatches=(Minibatch(microbatches=(m,), denominator=1.0, num_samples=3),))
    changed = set_advantages(batch, torch.tensor([7.0, 8.0, 9.0]))
    values = changed.minibatches[0].microbatches[0].advantages
    assert values[m.loss_mask].tolist() == [9.0, 7.0, 7.0, 7.0]


def test_documents_become_one_loss_over_all_their_tokens() -> None:
    rng = random.Random(0)
    documents = [[tuple(range(2, 4 + rng.randrange(9))) for _ in range(5)] for _ in range(4)]
    total = sum(len(d) - 1 for sequence in documents for d in sequence)
    seen = 0
    for rank in range(2):
        packing = Packing(dp_rank=rank, dp_size=2, max_tokens=30)
        minibatch = build_document_minibatch(documents, packing)
        assert minibatch.denominator == total
        for m in minibatch.microbatches:
            assert bool(m.loss_mask.all()) and float(m.loss_weights.sum()) == len(m.tokens)
            seen += len(m.tokens)
    assert seen == total


def test_where_attention_is_half_of_the_work_by_hand() -> None:
    config = families.config_of("qwen2")
    hidden, mlp, vocab, layers = 128, 128, 131, 4
    projections = hidden * (128 + 2 * 64) + 128 * hidden + (128 + 2 * 64)  # q, k, v, o; biases
    weights = layers * (projections + 3 * hidden * mlp + 2 * hidden) + vocab * hidden + hidden
    assert attention_break_even(mapping_for(config)) == pytest.approx(2 * weights / (4 * 4 * 64))
    # a token meets 2 of 4 experts: as many weights as with all four is twice as far
    mixture = families.config_of("qwen3_moe")
    dense = attention_break_even(mapping_for({**mixture, "num_experts_per_tok": 4}))
    experts = 3 * 4 * 3 * hidden * 48  # of three layers
    sparse = attention_break_even(mapping_for(mixture))
    assert dense - sparse == pytest.approx(2 * experts / 2 / (4 * 4 * 64))
