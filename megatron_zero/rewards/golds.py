r"""Gold answers that the verifier cannot read: what no response will be judged equal to.

A gold is read when it is a formula or something made of formulas (`equivalence.parse_answer`), or
plain text that is compared as such: words, a time, a ratio. Anything else equals nothing but the
very same characters. Of the paper's data sets that is at most one answer in 1,000 (`$t(0,4]$`), of
a wrong column nearly all: a solution instead of its answer, `{'ground_truth': '5'}`, an open brace.

Standard library only.
"""

import re
from collections.abc import Iterable, Sequence

from megatron_zero.rewards import normalize as norm
from megatron_zero.rewards.equivalence import readings

_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")  # most golds: read without parsing
# Words in any script; times, dates and ratios.
_PLAIN_TEXT = re.compile(r"[^\W\d_](?:[^\W\d_]|[\s,.()'-])*|\d+(?:[:/.-]\d+)+(?:[ap]m)?")
_MISSING = ("nan", "nat", "null", "<na>", "n/a")  # how tools write that there is none
_MISSING_AS_IS = ("None",)  # Python's; but "none" can be an answer


def is_readable(gold: str) -> bool:
    r"""Whether another text than the gold itself could be judged equal to it.

    Example:
        "\frac{1}{2}", "3:1", "two lines" can be read; "\frac{1}{2", "nan", "x = 5. So 7" cannot.
    """
    text = gold.strip()
    if _NUMBER.fullmatch(text):
        return True
    if text.casefold() in _MISSING or text in _MISSING_AS_IS:
        return False
    if len(text) > norm.MAX_ANSWER_CHARS:
        return False
    cleaned, _ = norm.clean(text)
    if readings(cleaned):
        return True
    return _PLAIN_TEXT.fullmatch(norm.normalize(cleaned)) is not None


def unreadable(golds: Iterable[Sequence[str]]) -> list[int]:
    """The places of those of which the verifier can read none; each a row's answers."""
    known: dict[str, bool] = {}
    found = []
    for place, answers in enumerate(golds):
        for answer in answers:
            if answer not in known:
                known[answer] = is_readable(answer)
        if not any(known[answer] for answer in answers):
            found.append(place)
    return found
