"""Dynamic sampling: which groups a step trains on, when it draws again, and resuming it."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.data.prompts import PromptCursor
from megatron_zero.determinism import sample_seed
from megatron_zero.rollout_rounds import RolloutRounds, has_signal
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

G = 2


def verdicts(*rewards: float) -> list[Graded]:
    return [Graded(reward=r, correct=r > 0, formatted=True, outcome="wrong") for r in rewards]


def group(index: int) -> RolloutGroup:
    prompt = Prompt(index=index, text="q", token_ids=(1,), answers=("1",))
    response = Response(
        token_ids=(1,), rollout_logprobs=(0.0,), text="", truncated=False, policy_version=0
    )
    return RolloutGroup(prompt=prompt, responses=(response,) * G)


def run_rounds(signals: Sequence[bool], *, num_prompts: int, max_rounds: int) -> RolloutRounds:
    """Draws groups 0, 1, 2, ... of which `signals` says which have one."""
    rounds = RolloutRounds(num_prompts=num_prompts, max_rounds=max_rounds)
    while rounds.num_missing:
        drawn = range(rounds.num_drawn, rounds.num_drawn + rounds.num_missing)
        rounds.add(
            [group(i) for i in drawn],
            [verdicts(1, 0) if signals[i] else verdicts(1, 1) for i in drawn],
        )
    return rounds


def chosen(rounds: RolloutRounds) -> list[int]:
    groups, graded = rounds.chosen()
    assert len(groups) == len(graded)
    return [g.prompt.index for g in groups]


@pytest.mark.parametrize(
    ("signals", "max_rounds", "expected", "num_drawn"),
    [
        ("+++", 4, [0, 1, 2], 3),  # nothing is missing
        ("+-+ +", 4, [0, 2, 3], 4),  # one prompt more, not three
        ("--- +-- ++", 4, [3, 6, 7], 8),
        ("--- +--", 2, [0, 1, 3], 6),  # rounds used up: filled in the order drawn
        ("--- ---", 2, [0, 1, 2], 6),
        ("-+-", 1, [0, 1, 2], 3),  # off: everything drawn, as it was drawn
    ],
)
def test_rounds_by_hand(signals, max_rounds, expected, num_drawn) -> None:
    flags = [s == "+" for s in signals.replace(" ", "")]
    rounds = run_rounds(flags, num_prompts=3, max_rounds=max_rounds)
    assert chosen(rounds) == expected and rounds.num_drawn == num_drawn


@settings(max_examples=100, deadline=None)
@given(
    signals=st.lists(st.booleans(), min_size=40, max_size=40),
    num_prompts=st.integers(1, 8),
    max_rounds=st.integers(1, 5),
)
def test_no_signal_is_thrown_away_and_rounds_are_bounded(signals, num_prompts, max_rounds) -> None:
    rounds = run_rounds(signals, num_prompts=num_prompts, max_rounds=max_rounds)
    taken, drawn = chosen(rounds), signals[: rounds.num_drawn]
    assert len(taken) == len(set(taken)) == num_prompts and taken == sorted(taken)
    with_signal = [i for i, s in enumerate(drawn) if s]
    assert set(with_signal) <= set(taken)
    assert len(with_signal) == num_prompts or rounds.num_drawn >= num_prompts
    assert rounds.num_drawn <= num_prompts * max_rounds
    if max_rounds == 1:
        assert taken == list(range(num_prompts)) and rounds.metrics() == {}
    else:
        assert rounds.metrics()["sampling/rounds"] <= max_rounds


def test_a_signal_is_a_difference_of_rewards() -> None:
    assert has_signal(verdicts(0, 0, 1)) and has_signal(verdicts(1, 0))
    assert not has_signal(verdicts(0, 0)) and not has_signal(verdicts(1, 1, 1))


def test_metrics_count_what_was_replaced() -> None:
    rounds = run_rounds([True, False, False, True], num_prompts=2, max_rounds=4)
    assert rounds.metrics() == {
        "sampling/rounds": 3.0,
        "sampling/groups_drawn": 4.0,
        "sampling/signal_frac": 0.5,
        "sampling/reward_mean": 0.75,
    }


def run_steps(
    cursor: PromptCursor, steps: range, rewards_of: Callable[[int, Prompt], Sequence[float]]
) -> list[list[int]]:
    """The loop of `train` without model and engine: which prompts each step trains on."""
    trained = []
    for step in steps:
        rounds = RolloutRounds(num_prompts=4, max_rounds=3)
        while rounds.num_missing:
            prompts, place = cursor.next_batch(rounds.num_missing), rounds.num_drawn
            rounds.add(
                [group(p.index) for p in prompts],
                [
                    verdicts(*rewards_of(sample_seed(0, step, place + i, p.index, 0), p))
                    for i, p in enumerate(prompts)
                ],
            )
        trained.append(chosen(rounds))
    return trained


def test_a_resumed_run_draws_the_same_prompts_with_the_same_seeds() -> None:
    prompts = [Prompt(index=i, text=str(i), token_ids=(i,), answers=("",)) for i in range(11)]
    seeds: list[int] = []

    def rewards_of(seed: int, prompt: Prompt) -> list[float]:
        seeds.append(seed)
        return [1.0, float(seed % 3 == 0)]  # a third of the groups have no signal

    def cursor() -> PromptCursor:
        return PromptCursor(prompts, 4, 0, True)

    whole = cursor()
    expected = run_steps(whole, range(6), rewards_of)
    assert len(set(seeds)) == len(seeds) > 6 * 4  # prompts were replaced, every draw has its seed
    first, second = cursor(), cursor()
    halves = run_steps(first, range(3), rewards_of)
    second.load_state_dict(first.state_dict())
    halves += run_steps(second, range(3, 6), rewards_of)
    assert halves == expected and second.state_dict() == whole.state_dict()
    assert seeds[: len(seeds) // 2] == seeds[len(seeds) // 2 :]
    assert whole.epoch == pytest.approx(len(seeds) / 2 / len(prompts))


def test_batches_of_any_size_walk_the_same_prompts() -> None:
    prompts = [Prompt(index=i, text=str(i), token_ids=(i,), answers=("",)) for i in range(5)]
    regular, ragged = (PromptCursor(prompts, 3, 1, True) for _ in range(2))
    by_threes = itertools.chain.from_iterable(regular.next_batch() for _ in range(4))
    sizes = (1, 4, 2, 5)
    by_sizes = itertools.chain.from_iterable(ragged.next_batch(n) for n in sizes)
    assert [p.index for p in by_threes] == [p.index for p in by_sizes]
    assert regular.state_dict() == ragged.state_dict()
