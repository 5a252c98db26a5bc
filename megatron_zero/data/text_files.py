"""Text and JSON from files, where whatever cannot be read is refused by its line.

UTF-8, with or without a byte order mark. JSON is strict where Python's reader is not: a key that an
object has twice is refused, since one of the two values would be lost without a word.
"""

import json
import re
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
        if line.strip():
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                _not_json(path, number, error, setting)
            _check_object(record, path, number, setting)
            records.append(record)
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
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position = _SPACE.match(text).end()
    records: list[dict[str, Any]] = []
    numbers = array("q")
    number = 1 + text.count("\n", 0, position)
    try:
        if text[position : position + 1] != "[":
            decoder.raw_decode(text, position)  # raises where it is no JSON at all
            valid = "must be a list of objects, or hold an object per line"
            fail(setting, str(path), f"{valid}{_looks_like(path)}")
        while text[position] != "]":
            start = _SPACE.match(text, position + 1).end()
            number += text.count("\n", position, start)
            if text[start : start + 1] == "]" and not records:
                position = start
                break
            record, end = decoder.raw_decode(text, start)
            _check_object(record, path, number, setting)
            records.append(record)
            numbers.append(number)
            position = _SPACE.match(text, end).end()
            number += text.count("\n", start, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        end = _SPACE.match(text, position + 1).end()
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (json.JSONDecodeError, RecursionError) as error:
        _not_json(path, getattr(error, "lineno", number), error, setting)
    except _TwiceError as error:
        _not_json(path, number, error, setting)
    if not records:
        fail(setting, str(path), "holds no records")
    return records, numbers


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise _TwiceError(f"an object has the key {twice!r} twice")
    return record


def _check_object(record: Any, path: Path, number: int, setting: str) -> None:
    if not isinstance(record, dict):
        kind = type(record).__name__
        fail(setting, str(path), f"line {number} holds a {kind}, not an object")


def _not_json(path: Path, number: int, error: Exception, setting: str) -> NoReturn:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at character {error.colno}"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    fail(setting, str(path), f"line {number} is not JSON: {reason}{_looks_like(path)}")


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
