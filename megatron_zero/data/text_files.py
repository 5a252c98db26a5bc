"""Text and JSON from files, where whatever cannot be read is refused by its line.

UTF-8, with or without a byte order mark. JSON is strict where Python's reader is not: a key that an
object has twice is refused, since one of the two values would be lost without a word.
"""

import json
import re
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megatron_zero.config import fail

_UNDECODABLE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes
_SPACE = re.compile(r"[ \t\r\n]*")

# How files begin that are often given the wrong suffix.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip: decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "parquet: name it .parquet",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
}

Records = tuple[list[dict[str, Any]], array]  # and the line of each, counted from 1


def read_text(path: Path, setting: str) -> str:
    """A file's text; line ends become a newline, as everywhere in Python.

    Raises:
        ValueError: it cannot be opened, or is not UTF-8 text: names the line.
    """
    return "".join(line for _, line in _lines(path, setting))


def read_json_records(path: Path, setting: str) -> Records:
    """The objects of a JSON file, and the line each begins in.

    `.jsonl` has one object per line; `.json` a list of objects, or lines all the same: two objects
    that follow one another can be nothing else.

    Raises:
        ValueError: not UTF-8, not JSON, or no objects: names the line.
    """
    if path.suffix == ".json":
        text = read_text(path, setting)
        if not _is_json_lines(text):
            return _list_of_objects(path, text, setting)
    records: list[dict[str, Any]] = []
    numbers = array("q")
    for number, line in _lines(path, setting):
        start = _SPACE.match(line).end()
        if start == len(line):
            continue
        record, end = _decode(path, line, start, number, setting)
        end = _SPACE.match(line, end).end()
        if end < len(line):
            reason = f"there is more behind its first value, at character {end + 1}"
            _refuse_line(path, number, f"is not JSON: {reason}", setting)
        records.append(_checked_object(record, path, number, setting))
        numbers.append(number)
    if not records:
        fail(setting, str(path), f"holds no records{_looks_like(path)}")
    return records, numbers


def _lines(path: Path, setting: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 text, as they come."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _checked_lines(file, path, setting)
    except OSError as error:
        fail(setting, str(path), f"cannot be read: {error.strerror}")


def _checked_lines(file: TextIO, path: Path, setting: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        wrong = None if line.isascii() else _UNDECODABLE.search(line)
        if wrong is not None:
            byte = f"byte 0x{ord(wrong.group()) - 0xDC00:02x} at character {wrong.start() + 1}"
            fail(setting, str(path), f"line {number} is not UTF-8: {byte}{_looks_like(path)}")
        yield number, line


def _is_json_lines(text: str) -> bool:
    """Whether text begins with an object, and has something behind it."""
    start = _SPACE.match(text).end()
    if text[start : start + 1] != "{":
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return _SPACE.match(text, end).end() < len(text)


def _list_of_objects(path: Path, text: str, setting: str) -> Records:
    """The elements of a list are read one by one, because only so their lines are known."""
    records: list[dict[str, Any]] = []
    numbers = array("q")
    position = _SPACE.match(text).end()
    number = 1 + text.count("\n", 0, position)
    if position == len(text):
        fail(setting, str(path), "holds no records")
    if text[position] != "[":
        value, _ = _decode(path, text, position, number, setting)  # refuses what is no JSON at all
        found = "a single object" if isinstance(value, dict) else type(value).__name__
        valid = "must be a list of objects, or hold several, one per line"
        fail(setting, str(path), f"holds {found}: {valid}")
    is_first = True
    while text[position : position + 1] != "]":
        start = _SPACE.match(text, position + 1).end()
        number += text.count("\n", position, start)
        if is_first and text[start : start + 1] == "]":
            fail(setting, str(path), "holds no records")
        is_first = False
        record, end = _decode(path, text, start, number, setting)
        records.append(_checked_object(record, path, number, setting))
        numbers.append(number)
        position = _SPACE.match(text, end).end()
        number += text.count("\n", start, position)
        if text[position : position + 1] not in (",", "]"):
            reason = "a comma or the list's end is missing"
            _refuse_line(path, number, f"is not JSON: {reason}", setting)
    end = _SPACE.match(text, position + 1).end()
    if end < len(text):
        number += text.count("\n", position, end)
        _refuse_line(path, number, "is not JSON: there is more behind the list", setting)
    return records, numbers


class _TwiceError(ValueError):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise _TwiceError(f"has an object with the key {twice!r} twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _decode(path: Path, text: str, start: int, number: int, setting: str) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends; `number` is the line of `start`."""
    try:
        return _DECODER.raw_decode(text, start)
    except _TwiceError as error:
        _refuse_line(path, number, str(error), setting)
    except json.JSONDecodeError as error:
        number += text.count("\n", start, error.pos)
        reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        _refuse_line(path, number, f"is not JSON: {reason}", setting)
    except RecursionError:
        _refuse_line(path, number, "is nested too deeply", setting)
    except ValueError:  # int() of too many digits
        digits = sys.get_int_max_str_digits()
        _refuse_line(path, number, f"has an integer of more than {digits} digits", setting)


def _checked_object(record: Any, path: Path, number: int, setting: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        _refuse_line(path, number, f"holds {type(record).__name__}, not an object", setting)
    return record


def _refuse_line(path: Path, number: int, reason: str, setting: str) -> NoReturn:
    fail(setting, str(path), f"line {number} {reason}{_looks_like(path)}")


def _looks_like(path: Path) -> str:
    """`; it looks like gzip: decompress it first`, or nothing."""
    with path.open("rb") as file:
        beginning = file.read(4096)
    for magic, kind in _BEGINNINGS.items():
        if beginning.startswith(magic):
            return f"; it looks like {kind}"
    if b"\0" in beginning:
        return "; it holds NUL bytes: it is binary, UTF-16 or was cut off while it was written"
    return ""
