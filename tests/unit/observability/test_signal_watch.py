"""When a run says that it learns nothing, how often, and what it takes for the reason."""

import pytest

from megatron_zero.observability.signal_watch import SignalWatch

SHARES = ("unparsable", "wrong", "correct", "timeout", "crash")


def step(no_signal: float = 1.0, truncated: float = 0.0, **outcomes: float) -> dict[str, float]:
    """A training step's metrics; all responses wrong if nothing else is said."""
    outcomes = outcomes or {"wrong": 1.0}
    shares = {f"outcome/{name}_frac": outcomes.get(name, 0.0) for name in SHARES}
    reward = outcomes.get("correct", 0.0) * (1 - truncated)
    return {
        "reward/no_signal_frac": no_signal,
        "reward/mean": reward,
        "response/truncated_frac": truncated,
        **shares,
    }


GOOD = step(no_signal=0.9, correct=0.2, wrong=0.8)


def watch(warn_after: int = 3, records=()) -> SignalWatch:
    return SignalWatch(
        warn_after=warn_after,
        max_response_tokens=77,
        template="qwen_math",
        answer_format="boxed",
        records=records,
    )


def test_it_warns_once_per_stretch() -> None:
    steps = [step()] * 5 + [GOOD] + [step()] * 2 + [GOOD] + [step()] * 3
    observed = watch()
    counts, due = [], []
    for number, metrics in enumerate(steps, start=1):
        counts.append(observed.observe(metrics))
        if observed.is_due:
            due.append(number)
    assert counts == [1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3]
    assert due == [3, 12]
    assert "the last 3 steps" in observed.warning()
    assert observed.summary() == "no signal in 10 of 12 steps"


def test_penalties_that_are_trained_on_alone_are_told_from_no_signal() -> None:
    observed = watch()
    for no_signal in (1.0, 0.125, 1.0):  # nothing is correct; long responses lose something
        observed.observe(step(no_signal=no_signal))
    assert "no response earned anything, only penalties were trained on" in observed.warning()
    assert "no group" not in observed.warning()
    silent = watch()
    for _ in range(3):
        silent.observe(step())
    assert "no group of responses had a signal" in silent.warning()


def test_a_resumed_run_goes_on_counting() -> None:
    steps = [{"eval/a/accuracy": 0.5}, GOOD, *[step()] * 6]
    for stop in range(len(steps)):
        resumed = watch(records=steps[:stop])
        whole = watch()
        for metrics in steps[:stop]:
            whole.observe(metrics)
        for metrics in steps[stop:]:
            assert resumed.observe(metrics) == whole.observe(metrics)
            assert resumed.is_due == whole.is_due
        assert resumed.summary() == whole.summary() == "no signal in 6 of 7 steps"


def test_no_reward_at_all_is_no_signal_whatever_a_penalty_says() -> None:
    observed = watch(warn_after=2)
    for _ in range(2):
        count = observed.observe(step(no_signal=0.0, wrong=1.0))
    assert count == 2 and observed.is_due
    # all correct, with a length penalty that tells them apart: something is learned
    assert observed.observe(step(no_signal=0.0, correct=1.0)) == 0


def test_zero_switches_the_warning_off_and_not_the_count() -> None:
    observed = watch(warn_after=0)
    assert [observed.observe(step()) for _ in range(4)] == [1, 2, 3, 4]
    assert not observed.is_due and not watch(warn_after=0).is_due
    assert observed.summary().startswith("warning: no signal in 4 of 4 steps: this run has learned")


@pytest.mark.parametrize(
    ("metrics", "reasons"),
    [
        (step(truncated=1.0, wrong=1.0), ["rollout.max_response_tokens=77", "too hard"]),
        (step(truncated=1.0, correct=1.0), ["rollout.max_response_tokens=77"]),
        (step(unparsable=1.0), ["reward.answer_format='boxed'", "data.template='qwen_math'"]),
        (step(unparsable=0.3, wrong=0.7), ["too hard", "data.answer_key"]),
        (step(correct=1.0), ["too easy"]),
        (step(timeout=0.4, crash=0.3, wrong=0.3), ["reward.timeout_s"]),
        (step(unparsable=0.4, wrong=0.3, correct=0.3), ["rollout.temperature"]),
    ],
)
def test_likely_reasons(metrics, reasons) -> None:
    observed = watch(warn_after=1)
    observed.observe(metrics)
    for text in (observed.warning(), observed.summary()):
        lines = [line for line in text.splitlines() if "likely: " in line]
        assert sum(any(reason in line for reason in reasons) for line in lines) == len(lines)
        for reason in reasons:
            assert any(reason in line for line in lines), reason


def test_the_shares_are_those_of_the_stretch() -> None:
    observed = watch(warn_after=2)
    for metrics in (GOOD, step(truncated=1.0, unparsable=1.0), step(truncated=0.5, wrong=1.0)):
        observed.observe(metrics)
    assert "responses: truncated 75%, no answer found 50%, wrong 50%\n" in observed.warning()
