"""What of a column can be a question, and what an answer.

A question is text. An answer is text or a number, or a list of such, any of which counts. Nothing
else becomes an answer by Python's spelling of it: no response would ever be equal to
"{'ground_truth': '2'}" or "nan", and a run would train on rewards of 0 without a word.
"""

import math
import re
import reprlib
from decimal import Decimal
from typing import Any

from megatron_zero.config import fail

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# Of an object's fields, the one that an example names: the first of these it has, else its first.
_TELLING = ("ground_truth", "answer", "content", "value", "text")


def question_text(value: Any, prompt_key: str, place: str) -> str:
    """Verbatim. Anything but text means that the wrong column is read: refused.

    Args:
        prompt_key: the column, or the path into it, as `data.prompt_key` may name it.
        place: row and file, for the message.

    Raises:
        ValueError: not text, blank, or text with a NUL or half a surrogate pair.
    """
    setting = "data.prompt_key"
    if value is None or value == "":
        fail(setting, prompt_key, f"{place}: empty, not a text")
    if not isinstance(value, str):
        kind = type(value).__name__
        fail(
            setting, prompt_key, f"{place}: {kind}, not a text{_way_in(value, setting, prompt_key)}"
        )
    if not value.strip():
        fail(setting, prompt_key, f"{place}: {value!r} is blank, not a question")
    check_text(value, setting, prompt_key, place)
    return value


def answer_texts(
    value: Any, answer_key: str, place: str, *, answer_after: str = ""
) -> tuple[str, ...]:
    """The answers of one row: stripped texts, empty and repeated ones left out.

    Numbers are spelled as Python does: the float 142.0 stays "142.0", as in the reference.

    Args:
        answer_key: the column, or the path into it, as `data.answer_key` may name it.
        place: row and file, for the message.
        answer_after: an answer is what follows the last of these.

    Raises:
        ValueError: what is there cannot be an answer.
    """
    values = value if isinstance(value, list) else [value]
    texts = []
    for each in values:
        text = _spelled(each)
        if text is None:
            setting = "data.answer_key"
            shown = f"{_SHORT.repr(value)} ({_kind(value)}) is no answer"
            way_in = _way_in(value, setting, answer_key)
            fail(setting, answer_key, f"{place}: {shown}{way_in or '; text or a finite number is'}")
        check_text(text, "data.answer_key", answer_key, place)
        if answer_after:
            text = text.rsplit(answer_after, maxsplit=1)[-1]
        if text.strip():
            texts.append(text.strip())
    return tuple(dict.fromkeys(texts))


def check_text(text: str, setting: str, key: str, place: str) -> None:
    """Refuse text that no tokenizer can read, or that damage has left.

    Raises:
        ValueError: a NUL character, or half a surrogate pair.
    """
    wrong = None if text.isascii() and "\0" not in text else _NO_TEXT.search(text)
    if wrong is not None:
        kind = "NUL character" if wrong.group() == "\0" else "lone surrogate"
        found = f"a {kind} {wrong.group()!r} at character {wrong.start() + 1}"
        fail(setting, key, f"{place}: {found}, which is not text")


def _spelled(value: Any) -> "str | None":
    """An answer as text; None when it cannot be one. Nothing there is "": left out."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):  # True and False too, which the verifier reads
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    return None


def _kind(value: Any) -> str:
    """What a value is, in words; of objects the fields."""
    if isinstance(value, dict):
        return f"an object with fields {', '.join(map(str, value))}" if value else "an empty object"
    if isinstance(value, list):
        odd = next((each for each in value if _spelled(each) is None), None)
        return f"a list that holds {_kind(odd)}" if odd is not None else "a list"
    return type(value).__name__


def _way_in(value: Any, setting: str, key: str) -> str:
    """How to reach a text or number inside of objects and lists, if there is one."""
    path = key
    while isinstance(value, dict | list) and value:
        if isinstance(value, dict):
            step = next((name for name in _TELLING if name in value), next(iter(value)))
            value = value[step]
        else:
            step, value = 0, value[0]
        path = f"{path}.{step}"
    if path == key or isinstance(value, dict | list):
        return ""
    return f"; name one part, as in {setting}={path}"
