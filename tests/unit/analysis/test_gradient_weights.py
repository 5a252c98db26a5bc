"""What each response weighs in the gradient: by hand, as batching gives it, and the paper's claims.

The step that the numbers here are worked out for (advantages of Dr. GRPO, then of GRPO):

    question   rewards   lengths        advantages                 divided by the std
    0          1 0 0 0   10 10 20 40    0.75 -0.25 -0.25 -0.25     / 0.5
    1          1 1 0 0   10 20 10 20    0.5 0.5 -0.5 -0.5          / sqrt(1/3)
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.advantages import group_advantages
from megatron_zero.analysis.rollout_stats import difficulty, length_bucket, weight_metrics
from megatron_zero.batching import Packing, build_global_batch, build_samples, sample_weights
from megatron_zero.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    replace,
)
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

OBJECTIVES = {  # name -> advantage.normalize_std, loss.length_normalizer
    "run": (False, "constant"),
    "dr_grpo": (False, "constant"),
    "only_std": (True, "constant"),
    "only_length": (False, "response"),
    "grpo": (True, "response"),
}
REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
LENGTHS = torch.tensor([[10, 10, 20, 40], [10, 20, 10, 20]])
ADVANTAGES = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]).double()


def run_config(
    num_prompts: int, *, global_batch_size: int, length_normalizer: str = "constant"
) -> RunConfig:
    """Of a run whose longest response has 50 tokens."""
    return RunConfig(
        name="test",
        model=ModelConfig(path="unused"),
        data=DataConfig(max_prompt_tokens=2),
        rollout=RolloutConfig(
            num_prompts_per_step=num_prompts, group_size=4, max_response_tokens=50
        ),
        loss=LossConfig(length_normalizer=length_normalizer),
        batch=BatchConfig(global_batch_size=global_batch_size, max_tokens_per_microbatch=100),
    )


def step_of(rewards: torch.Tensor, lengths: torch.Tensor, *, truncated: int = 40):
    """Groups and verdicts; a response of `truncated` tokens is one that was cut off."""
    groups, graded = [], []
    for p, (row, of) in enumerate(zip(rewards.tolist(), lengths.tolist(), strict=True)):
        responses = [
            Response(
                token_ids=(7,) * length,
                rollout_logprobs=(-1.0,) * length,
                text=f"{p}",
                truncated=length == truncated,
                policy_version=0,
            )
            for length in of
        ]
        prompt = Prompt(index=p, text=f"question {p}", token_ids=(1, 2), answers=("",))
        groups.append(RolloutGroup(prompt=prompt, responses=tuple(responses)))
        graded.append(
            tuple(
                Graded(reward=r, correct=r > 0, formatted=True, outcome="correct" if r else "wrong")
                for r in row
            )
        )
    return groups, graded


def shares(
    rewards: torch.Tensor, lengths: torch.Tensor, *, mask_truncated: bool = False
) -> dict[str, torch.Tensor]:
    """What `analyze bias` gives to each response of a step, [P, G] by objective."""
    pytest.importorskip("matplotlib")
    import pandas as pd

    from megatron_zero.analyze_tables import weigh

    config = run_config(1, global_batch_size=4)
    config = replace(config, loss=LossConfig(mask_truncated=mask_truncated))
    columns = {
        "step": torch.ones_like(lengths),
        "question": torch.arange(len(lengths))[:, None].expand_as(lengths),
        "reward": rewards.double(),
        "length": lengths,
        "truncated": lengths == 40,
        "advantage": group_advantages(rewards.double(), normalize_std=False),
    }
    found = weigh(pd.DataFrame({k: v.flatten().tolist() for k, v in columns.items()}), config)
    return {
        name: torch.tensor(found[name].tolist(), dtype=torch.float64).view(lengths.shape)
        for name in found
    }


def test_shares_by_hand() -> None:
    """Dr. GRPO: |A| times length, of 55 in all; GRPO: |A| / std."""
    found = shares(REWARDS, LENGTHS)
    by_hand = torch.tensor([[7.5, 2.5, 5, 10], [5, 10, 5, 10]]).double() / 55
    assert torch.allclose(found["dr_grpo"], by_hand) and torch.allclose(found["run"], by_hand)
    assert torch.allclose(found["only_length"], ADVANTAGES.abs() / 3.5)
    question_1 = 4 * 0.5 * math.sqrt(3)
    assert found["grpo"][0].sum().item() == pytest.approx(3 / (3 + question_1))
    assert shares(0 * REWARDS, LENGTHS)["grpo"].isnan().all()
    # a response without tokens has no weight
    without = shares(torch.tensor([[1.0, 0]]), torch.tensor([[0, 3]]))
    assert all(row.tolist() == [[0, 1]] for row in without.values())


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_shares_are_what_batching_gives_to_the_tokens(mask_truncated: bool) -> None:
    """Two optimizer steps on two ranks, with samples left out and padding."""
    rewards = torch.cat([REWARDS, torch.ones(1, 4)])  # a third question, without signal
    lengths = torch.cat([LENGTHS, LENGTHS[:1]])
    groups, graded = step_of(rewards, lengths)
    expected = shares(rewards, lengths, mask_truncated=mask_truncated)
    for name, (normalize_std, normalizer) in OBJECTIVES.items():
        advantages = group_advantages(rewards, normalize_std=normalize_std)
        config = run_config(3, global_batch_size=6, length_normalizer=normalizer)
        masked = mask_truncated and name == "run"
        samples = build_samples(groups, graded, advantages, mask_truncated=masked)
        weights: dict[int, float] = {}
        for rank in range(2):
            packing = Packing(dp_rank=rank, dp_size=2, max_tokens=100, alignment=4)
            part = sample_weights(build_global_batch(samples, config, packing, step=0))
            assert not weights.keys() & part.keys()
            weights |= part
        found = torch.tensor([weights.get(i, 0.0) for i in range(12)]).view(3, 4)
        assert torch.allclose(found.double() / found.sum(), expected[name], atol=1e-6), name


def test_the_denominator_is_part_of_a_sample_weight() -> None:
    groups, graded = step_of(REWARDS, LENGTHS)
    samples = build_samples(groups, graded, ADVANTAGES)
    config = run_config(2, global_batch_size=8)
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=200)
    weights = sample_weights(build_global_batch(samples, config, packing, step=0))
    assert weights[3] == pytest.approx(0.25 * 40 / (8 * 50))


def test_logged_weights_by_hand() -> None:
    """Question 0 has 1 of 4 right: hard; question 1 is medium. Quarters of 40 tokens."""
    groups, graded = step_of(REWARDS, LENGTHS)
    weights = dict(enumerate([7.5, 2.5, 5, 10, 5, 10, 5, 10]))
    metrics = weight_metrics(groups, graded, weights, max_response_tokens=40)
    by_hand = {"difficulty_hard": 25, "difficulty_medium": 30, "length_q1": 20, "length_q2": 25}
    by_hand |= {"length_q4": 10}
    assert len(metrics) == 9
    for name, value in metrics.items():
        assert value == pytest.approx(by_hand.get(name.removeprefix("weight/"), 0) / 55), name
    del weights[3]  # as of a sample that was left out
    metrics = weight_metrics(groups, graded, weights, max_response_tokens=40)
    assert metrics["weight/difficulty_hard"] == pytest.approx(15 / 45)
    assert metrics["weight/length_q4"] == 0
    assert weight_metrics(groups, graded, {0: 0.0}, max_response_tokens=40) == {}


def test_buckets() -> None:
    rates = [0, 1 / 16, 1 / 4, 0.26, 0.74, 3 / 4, 15 / 16, 1]
    names = ["all_wrong", "hard", "hard", "medium", "medium", "easy", "easy", "all_correct"]
    assert [difficulty(rate) for rate in rates] == names
    lengths = [0, 1, 25, 26, 50, 51, 75, 76, 100]
    quarters = ["q1", "q1", "q1", "q2", "q2", "q3", "q3", "q4", "q4"]
    assert [length_bucket(length, 100) for length in lengths] == quarters
    assert length_bucket(1, 3) == "q2"  # a third is more than a quarter


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 16), st.data())
def test_the_std_gives_more_weight_to_too_easy_and_too_hard_questions(group_size, data) -> None:
    """The paper's difficulty bias: the further a success rate is from 1/2, the more is gained."""
    num_correct = st.integers(1, group_size - 1)
    correct = data.draw(st.lists(num_correct, min_size=2, max_size=6, unique=True))
    rewards = torch.tensor([[i < k for i in range(group_size)] for k in correct]).double()
    found = shares(rewards, torch.full(rewards.shape, 30))
    gain = found["only_std"].sum(1) / found["dr_grpo"].sum(1)
    distance = [abs(k / group_size - 0.5) for k in correct]
    for i, j in zip(range(len(correct)), range(1, len(correct)), strict=False):
        if abs(distance[i] - distance[j]) < 1e-9:
            assert gain[i].item() == pytest.approx(gain[j].item())
        else:
            assert (gain[i] > gain[j]).item() == (distance[i] > distance[j])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100))
def test_a_response_normaliser_gives_a_long_wrong_response_less_weight_per_token(
    short, more
) -> None:
    """The paper's length bias; Dr. GRPO weighs every token of the group's wrong answers alike."""
    lengths = torch.tensor([[50, short, short + more]])
    found = shares(torch.tensor([[1.0, 0, 0]]), lengths)
    per_token = {name: share[0] / lengths[0] for name, share in found.items()}
    for name, (_, normalizer) in OBJECTIVES.items():
        ratio = (per_token[name][2] / per_token[name][1]).item()
        if normalizer == "response":
            assert ratio == pytest.approx(short / (short + more), rel=1e-4) and ratio < 1
        else:
            assert ratio == pytest.approx(1, rel=1e-4)
