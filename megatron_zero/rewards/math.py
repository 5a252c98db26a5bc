r"""The reward for mathematical answers: find the final answer in a response, compare, 1 or 0.

No reward for format alone. Where the answer is looked for depends on the template:

    boxed               the last `\boxed{…}` of the response
    boxed_after_think   the same, after the one `</think>`
    answer_tag          what follows the last `<answer>` of `… </think> <answer> … </answer>`
    answer_tag_lenient  the same, whatever is before `<answer>`
"""

import re
from typing import Optional

from megatron_zero.config import ANSWER_FORMATS
from megatron_zero.rewards.base import verdict
from megatron_zero.rewards.equivalence import Gold, is_equivalent
from megatron_zero.types import Graded

MAX_EXTRACTED_CHARS = 10_000  # a box that is still open after so many characters is none

_BOX = "\\boxed"
_BOXED = re.compile(r"\\boxed ?\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

__all__ = ["Gold", "extract_answer", "find_answer", "is_equivalent", "math_reward"]


def extract_answer(response: str, answer_format: str) -> Optional[str]:
    r"""The final answer of a response, or None when there is none to be found.

    Examples:
        extract_answer("so \boxed{\frac{1}{2}}.", "boxed") == "\frac{1}{2}"
        extract_answer("… </think> <answer>5</answer>", "answer_tag") == "5"
        extract_answer("… </think>\n<answer>5</answer>", "answer_tag") is None

    Raises:
        ValueError: for an unknown format.
    """
    return find_answer(response, answer_format)[1]


def find_answer(response: str, answer_format: str) -> tuple[bool, Optional[str]]:
    r"""Whether the response keeps to the format, and its answer; linear in the response.

    `(True, None)`: answer tags around a `\boxed` that never closes.
    """
    if answer_format == "boxed_after_think":
        _, *after = response.split("</think>", maxsplit=2)
        response, answer_format = after[0] if len(after) == 1 else "", "boxed"
    if answer_format == "boxed":
        answer = _last_boxed(response)
        return answer is not None, answer
    if answer_format not in ("answer_tag", "answer_tag_lenient"):
        raise ValueError(f"answer_format={answer_format!r}: must be one of {ANSWER_FORMATS}")
    opening = "</think> <answer>" if answer_format == "answer_tag" else "<answer>"
    if opening not in response or "</answer>" not in response:
        return False, None
    start = response.rindex("<answer>") + len("<answer>")
    answer = response[start:].partition("</answer>")[0].strip()
    if _BOX in answer:
        return True, _last_boxed(answer)
    return True, answer if len(answer) <= MAX_EXTRACTED_CHARS else None


def _last_boxed(text: str) -> Optional[str]:
    r"""The content of the last `\boxed{`, if its brace is closed."""
    starts = [box.end() for box in _BOXED.finditer(text)]  # not "I will use \boxed."
    start, depth = starts[-1] if starts else len(text), 1
    for match in _BRACE.finditer(text, start, start + MAX_EXTRACTED_CHARS):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return None


def math_reward(response: str, gold: Gold, answer_format: str) -> Graded:
    r"""Grade one response in this process: for trusted text; training goes through the pool.

    Example:
        math_reward("\boxed{0.5}", ("1/2",), "boxed")
            == Graded(reward=1.0, correct=True, formatted=True, outcome="correct")
    """
    formatted, answer = find_answer(response, answer_format)
    if answer is None:
        return verdict(formatted, "unparsable")
    return verdict(formatted, "correct" if is_equivalent(answer, gold) else "wrong")
