"""Which of several answers to one problem are the same: what a majority vote counts.

Two answers are of one class when the verifier calls them equal, or when a chain of answers links
them that it calls equal, each with the next. Nearly always that is the same. It differs where an
answer can be read in two ways: `50\\%` is both `0.5` and `50`, which without it are not equal.

A response without an answer, or with an empty one, is in no class.
"""

from collections.abc import Collection, Sequence
from typing import Optional

Pair = tuple[str, str]


def pairs_to_compare(answers: Sequence[Optional[str]]) -> list[Pair]:
    """Every two different texts among the answers, each pair once, the smaller text first."""
    texts = sorted({answer for answer in answers if answer})
    return [(one, other) for i, one in enumerate(texts) for other in texts[i + 1 :]]


def answer_classes(
    answers: Sequence[Optional[str]], equal: Collection[Pair]
) -> list[Optional[int]]:
    """The class of each answer, numbered in the order in which they appear; None: no answer.

    Args:
        equal: those of `pairs_to_compare(answers)` that mean the same.

    Example:
        answer_classes(["1/2", None, "3", "0.5"], {("0.5", "1/2")}) == [0, None, 1, 0]
    """
    class_of = {answer: number for number, answer in enumerate(dict.fromkeys(answers)) if answer}
    for pair in pairs_to_compare(answers):
        if pair in equal:
            kept, merged = sorted(class_of[answer] for answer in pair)
            for answer, number in class_of.items():
                if number == merged:
                    class_of[answer] = kept
    numbers: dict[int, int] = {}
    classes: list[Optional[int]] = []
    for answer in answers:
        if answer:
            number = class_of[answer]
            classes.append(numbers.setdefault(number, len(numbers)))
        else:
            classes.append(None)
    return classes
