r"""Gold answers that the verifier cannot read: what no response will be judged equal to.

A gold is read when it is a formula or something made of formulas (`equivalence.parse_answer`), or
plain text that is compared as such: words, a time, a ratio. Anything else equals nothing but the
very same characters. Of the paper's data sets that is at most one answer in 1,000 (`$t(0,4]$`), of
a wrong column nearly all: a solution instead of its answer, `{'ground_truth': '5'}`, an open brace.

Standard library only.
"""

import re
from collections.abc import Mapping, Sequence

from megatron_zero.checks import fail
from megatron_zero.rewards import normalize as norm
from megatron_zero.rewards.equivalence import readings

_NUM_NAMED_ROWS = 5
_NUM_SHOWN_CHARS = 60

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


def unreadable(golds: Mapping[int, Sequence[str]]) -> list[int]:
    """The rows of which the verifier can read no answer.

    Args:
        golds: row -> its answers, of which any counts.
    """
    known: dict[str, bool] = {}
    found = []
    for row, answers in golds.items():
        for answer in answers:
            if answer not in known:
                known[answer] = is_readable(answer)
        if not any(known[answer] for answer in answers):
            found.append(row)
    return found


def check_readable(golds: Mapping[int, Sequence[str]], *, setting: str, value: str) -> str:
    """How many golds of a data set cannot be read, in one sentence; "" if all can.

    Args:
        golds: row -> its answers.
        setting, value: what decides which answers these are.

    Raises:
        ValueError: none can be: no response would ever be correct.
    """
    rows = unreadable(golds)
    if not rows:
        return ""
    shown = f"row {rows[0]} has {golds[rows[0]][0][:_NUM_SHOWN_CHARS]!r}"
    if len(rows) == len(golds):
        valid = (
            f"the verifier can read none of the {len(golds):,} gold answers, {shown}; must be "
            f"final answers, as 42 or \\frac{{1}}{{2}}"
        )
        fail(setting, value, valid)
    first = ", ".join(map(str, rows[:_NUM_NAMED_ROWS]))
    if len(rows) > _NUM_NAMED_ROWS:
        first += ", ..."
    return (
        f"the verifier cannot read {len(rows):,} of {len(golds):,} gold answers, and only the same "
        f"text will count as correct: rows {first}; {shown}"
    )
