"""What every reward shares: its verdict, and the rule for truncated responses."""

from dataclasses import replace

from megatron_zero.types import Graded


def apply_truncation(graded: Graded, truncated: bool) -> Graded:
    """A truncated response earns 0, even a correct one; `correct` keeps the verdict before that.

    Example:
        apply_truncation(Graded(reward=1.0, correct=True, ...), True).reward == 0.0
    """
    return replace(graded, reward=0.0) if truncated else graded


def verdict(formatted: bool, outcome: str) -> Graded:
    """The reward of an outcome: 1 for "correct", else 0; none for format alone."""
    correct = outcome == "correct"
    return Graded(reward=float(correct), correct=correct, formatted=formatted, outcome=outcome)
