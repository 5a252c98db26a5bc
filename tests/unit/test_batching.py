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
from megatron_zero.types import GlobalBatch, Minibatch, TrainSample


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
