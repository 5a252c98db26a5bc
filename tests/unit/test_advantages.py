"""Advantages against exact arithmetic, and where there is no signal: 0, everywhere the same."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.advantages import (
    STD_EPS,
    advantage_function,
    group_advantages,
    groups_with_signal,
    leave_one_out_advantages,
    less_kl,
    training_rewards,
)
from megatron_zero.analysis.rollout_stats import rollout_metrics
from megatron_zero.batching import build_samples, samples_to_train
from megatron_zero.config import AdvantageConfig, RewardConfig
from megatron_zero.rollout_rounds import has_signal
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONFIGS = {
    "Dr. GRPO": AdvantageConfig(),
    "GRPO": AdvantageConfig(normalize_std=True),
    "RLOO": AdvantageConfig(baseline="leave_one_out"),
}


def exact_root(value: Fraction) -> Fraction:
    with localcontext(prec=60):
        return Fraction((Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


def exact_advantages(rewards: "list[float]", config: AdvantageConfig) -> "list[Fraction]":
    """The formulas as they are written, of one group, in rational numbers."""
    exact = [Fraction(reward) for reward in rewards]
    size = len(exact)
    if config.baseline == "leave_one_out":
        return [r - (sum(exact) - r) / (size - 1) for r in exact]
    centred = [r - sum(exact) / size for r in exact]
    if not config.normalize_std:
        return centred
    deviation = exact_root(sum(c * c for c in centred) / (size - 1))
    return [c / (deviation + Fraction(STD_EPS)) for c in centred]


@st.composite
def reward_groups(draw: st.DrawFn) -> torch.Tensor:
    """[1, G]: a few distinct values, apart or some roundings from one another, in any dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(2, 33))
    first = draw(st.floats(-1000, 1000, width=32))
    values = [first, *draw(st.lists(st.floats(-1000, 1000, width=32), max_size=3))]
    eps = torch.finfo(dtype).eps
    values += [first * (1 + n * eps) for n in draw(st.lists(st.integers(-3, 3), max_size=2))]
    row = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
    return torch.tensor([row], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(rewards=reward_groups())
def test_advantages_are_the_exact_ones_up_to_rounding(name, rewards) -> None:
    """The bound scales with the differences, not with the rewards: of equal ones it is 0."""
    got = advantage_function(CONFIGS[name])(rewards)
    assert got.dtype == rewards.dtype
    row = rewards[0].tolist()
    exact = exact_advantages(row, CONFIGS[name])
    size, largest = len(row), max(abs(e) for e in exact)
    work = torch.finfo(torch.promote_types(rewards.dtype, torch.float32))
    result = torch.finfo(rewards.dtype)
    relative = (2 * size + 8) * work.eps + result.eps
    tolerance = Fraction(relative) * largest
    if largest > 0:  # and what underflows, before the division and after
        tolerance += Fraction(work.smallest_normal * work.eps) / Fraction(STD_EPS)
        tolerance += Fraction(result.smallest_normal * result.eps)
    for value, expected in zip(got[0].tolist(), exact, strict=True):
        assert abs(Fraction(value) - expected) <= tolerance
    if len(set(row)) == 1:
        assert got.tolist() == [[0.0] * size] and groups_with_signal(got) == [False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_rewards_have_advantage_zero_and_are_skipped(name, dtype) -> None:
    values = [0.7, 0.1, -0.3, 1 / 3, 1e-7, 12345.678, 0.99999994, 1.0, 0.0, -1.0]
    for size in range(2, 40):
        column = torch.tensor(values, dtype=torch.float64).to(dtype)
        rewards = column[:, None].repeat(1, size)
        kl = torch.full_like(rewards, 0.3)
        for got in (
            advantage_function(CONFIGS[name])(rewards),
            advantage_function(CONFIGS[name])(less_kl(rewards, kl, 0.01)),
        ):
            assert not got.any() and not any(groups_with_signal(got)), size
    groups, graded = step_of([[0.7] * 7, [0.7] * 6 + [0.2]])
    advantages = advantage_function(CONFIGS[name])(
        training_rewards(groups, graded, RewardConfig(), max_length=4).to(dtype)
    )
    samples = build_samples(groups, graded, advantages)
    kept = samples_to_train(samples, min_samples=1, skip_zero_advantage=True)
    assert kept == list(range(7, 14))


@pytest.mark.parametrize("name", CONFIGS)
def test_rewards_of_zero_and_one_keep_every_digit(name) -> None:
    """What measuring from the smallest reward must not change: the formulas, taken literally."""
    for size in range(2, 65):
        correct = torch.arange(1, size)[:, None]
        rewards = (torch.arange(size) < correct).float()
        others = rewards.sum(dim=1, keepdim=True) - rewards
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        literal = {
            "Dr. GRPO": centred,
            "GRPO": centred / (rewards.std(dim=1, keepdim=True) + STD_EPS),
            "RLOO": rewards - others / (size - 1),
        }
        assert torch.equal(advantage_function(CONFIGS[name])(rewards), literal[name]), size


def test_a_single_response_has_no_advantage_under_any_baseline() -> None:
    rewards = torch.ones(3, 1)
    for normalize_std in (False, True):
        with pytest.raises(ValueError, match="'group_mean': needs at least 2 responses"):
            group_advantages(rewards, normalize_std=normalize_std)
    with pytest.raises(ValueError, match="'leave_one_out': needs at least 2 responses"):
        leave_one_out_advantages(rewards)


def step_of(
    rewards: "list[list[float]]", lengths: "list[list[int]] | None" = None
) -> "tuple[list[RolloutGroup], list[list[Graded]]]":
    """Groups with these rewards and lengths (2 tokens each if not given)."""
    groups, graded = [], []
    for p, row in enumerate(rewards):
        of_group = [2] * len(row) if lengths is None else lengths[p]
        responses = [
            Response(
                token_ids=(7,) * length,
                rollout_logprobs=(-1.0,) * length,
                text="",
                truncated=False,
                policy_version=0,
            )
            for length in of_group
        ]
        prompt = Prompt(index=p, text="q", token_ids=(1, 2), answers=("1",))
        groups.append(RolloutGroup(prompt=prompt, responses=tuple(responses)))
        graded.append(
            [Graded(reward=r, correct=r > 0, formatted=True, outcome="wrong") for r in row]
        )
    return groups, graded


@pytest.mark.parametrize(
    ("penalty", "buffer", "correct_over", "wrong_over"),
    [(3.0, 3, 1, 0), (1.1, 11, 10, 0), (3.3, 33, 13, 3), (2.7, 27, 11, 1), (0.3, 7, 2, 2)],
)
def test_what_the_penalty_makes_equal_is_equal(penalty, buffer, correct_over, wrong_over) -> None:
    """A correct response that loses just its reward, beside wrong ones: 1 - p a / b = 0 - p c / b.

    In the last case the rewards are equal and so are the lengths.
    """
    limit = 50
    start = limit - buffer
    reward = RewardConfig(overlong_buffer_tokens=buffer, overlong_penalty=penalty)
    first = 0.0 if correct_over == wrong_over else 1.0
    for size in range(2, 20):
        lengths = [start + correct_over, *[start + wrong_over] * (size - 1)]
        groups, graded = step_of([[first, *[0.0] * (size - 1)]], [lengths])
        rewards = training_rewards(groups, graded, reward, max_length=limit)
        for config in CONFIGS.values():
            assert not advantage_function(config)(rewards).any()


@settings(max_examples=200, deadline=None)
@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0]), min_size=6, max_size=6)),
    name=st.sampled_from(sorted(CONFIGS)),
)
def test_metric_rounds_and_advantages_agree_where_there_is_no_signal(rewards, name) -> None:
    """Also the penalty's: it can only tell responses of unlike lengths apart."""
    rewards = [*rewards, [0.7] * 6]
    groups, graded = step_of(rewards)
    for reward in (RewardConfig(), RewardConfig(overlong_buffer_tokens=3, overlong_penalty=0.3)):
        shaped = training_rewards(groups, graded, reward, max_length=4)
        advantages = advantage_function(CONFIGS[name])(shaped)
        signals = groups_with_signal(advantages)
        assert signals == [has_signal(row) for row in graded]
        assert signals == [len(set(row)) > 1 for row in rewards]
        no_signal = rollout_metrics(groups, graded, signals)["reward/no_signal_frac"]
        assert no_signal == pytest.approx(1 - sum(signals) / len(signals))
