"""One view of everything that has columns: parquet, JSON, folders and the hub.

A `Table` knows its column names at once and reads a column when asked, so that a corpus with many
columns costs only those that are used. Keys may be paths into nested columns: `extra_info.question`
or `prompt.0.content` read the formats of other trainers as they are.

A file that cannot be read is refused in one sentence, with its name and the row or line.
"""

import bisect
import difflib
import itertools
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_zero.config import fail
from megatron_zero.config_data import FILE_SUFFIXES
from megatron_zero.data.text_files import read_json_records

_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


# What `load_from_disk` raises where its files are missing or damaged, besides Arrow's errors.
_DAMAGED_DATASET = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns of equal length. `origin` says where it was found, for messages."""

    origin: str
    columns: tuple[str, ...]
    read: Callable[[str], list[Any]]
    place: Callable[[int], str]  # of a row, counted from 0: "row 3 (line 4) of x.jsonl"

    def has(self, key: str) -> bool:
        """Whether `key` is a column, or a path that starts with one."""
        return key in self.columns or key.split(".")[0] in self.columns

    def values(self, key: str, setting: str) -> list[Any]:
        """One value per row; None where a nested path leads nowhere.

        Raises:
            ValueError: no such column, or the column has values and the path leads to none of
                them; names `setting`, the columns or fields there are and the nearest one.
        """
        self.check_column(key, setting)
        if key in self.columns:
            return self.read(key)
        column, *path = key.split(".")
        values = self.read(column)
        found = [_descend(value, path) for value in values]
        there = next((value for value in values if value is not None), None)
        if there is not None and all(value is None for value in found):
            self._refuse_path(setting, key, there)
        return found

    def check_column(self, key: str, setting: str) -> None:
        """Refuse a `key` that neither is a column nor starts with one; nothing is read.

        Raises:
            ValueError: names `setting`, the columns there are and the nearest one.
        """
        if not self.has(key):
            there = f"{', '.join(self.columns)}{did_you_mean(key, self.columns)}"
            fail(setting, key, f"no such column in {self.origin}; it has {there}")

    def _refuse_path(self, setting: str, key: str, value: Any) -> NoReturn:
        """Say where a path into `value`, one of the column's, ends."""
        done, *path = key.split(".")
        while path and _descend(value, path[:1]) is not None:
            value = _descend(value, path[:1])
            done = f"{done}.{path.pop(0)}"
        if isinstance(value, dict):
            names = [str(name) for name in value]
            there = f"has fields {', '.join(names)}{did_you_mean(path[0], names) if path else ''}"
        elif isinstance(value, list):
            there = f"is a list of {len(value)}"
        else:
            there = f"is {type(value).__name__}"
        fail(setting, key, f"leads nowhere in {self.origin}: there, {done} {there}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing when no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""


def _descend(value: Any, path: list[str]) -> Any:
    for step in path:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def what_is_at(path: Path, setting: str) -> str:
    """ "file" or "folder", or "" where there is neither.

    Raises:
        ValueError: something is there, or may be, and cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a NUL in the name
        return ""
    except OSError as error:
        fail(setting, str(path), f"cannot be read: {error.strerror}")
    kind = ""
    if stat.S_ISDIR(mode):
        kind = "folder"
    elif stat.S_ISREG(mode):
        kind = "file"
    needed = os.R_OK | os.X_OK if kind == "folder" else os.R_OK
    if kind and not os.access(path, needed, effective_ids=True):
        fail(setting, str(path), "cannot be read: Permission denied")
    return kind


def open_table(path: Path, split: str, setting: str) -> Table:
    """A file (`FILE_SUFFIXES`), a folder of parquet files, or one made by `save_to_disk`.

    Args:
        split: which part of a folder that has several: a `DatasetDict`, or files named after them.
        setting: what the path was given as, for error messages.

    Raises:
        ValueError: nothing there that can be read, or no such split.
    """
    kind = what_is_at(path, setting)
    if kind == "folder":
        return _open_folder(path, split, setting)
    if not kind:
        fail(setting, str(path), "no such file or folder")
    if path.suffix == ".parquet":
        return _parquet_table(str(path), [path], setting)
    if path.suffix in FILE_SUFFIXES:
        return _json_table(path, setting)
    compressed = " (decompress it first)" if path.suffix in _COMPRESSED else ""
    valid = f"must be a folder or end in one of {', '.join(FILE_SUFFIXES)}{compressed}"
    fail(setting, str(path), valid)


def _open_folder(folder: Path, split: str, setting: str) -> Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _saved_dataset(folder, split, setting)
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not files:
        valid = "a folder must hold parquet files, or be one written by datasets' save_to_disk"
        fail(setting, str(folder), valid)
    return _parquet_table(str(folder), _files_of_split(folder, files, split), setting)


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Files named `train.parquet` or `train-00000-of-00001.parquet` are a split; others are not."""
    of_file = {file: file.stem.split("-")[0] for file in files}
    if split in of_file.values():
        return [file for file in files if of_file[file] == split]
    splits = {name for name in of_file.values() if name in _SPLIT_NAMES}
    if splits:
        fail("data.split", split, f"{folder} has {', '.join(sorted(splits))}")
    return files


def _parquet_table(origin: str, files: list[Path], setting: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megatron_zero.data.arrow_values import UndecodableError, column_values

    names, ends = [], [0]
    for file in files:
        try:
            metadata = pq.read_metadata(file)
            names.append(metadata.schema.to_arrow_schema().names)
        except (pa.ArrowException, OSError) as error:
            _unreadable(file, "parquet", error, setting)
        ends.append(ends[-1] + metadata.num_rows)
        for name in names[-1]:
            if names[-1].count(name) > 1:
                fail(setting, str(file), f"has two columns named {name!r}")
    shared = tuple(name for name in names[0] if all(name in others for others in names))

    def read(column: str) -> list[Any]:
        values = []
        for file in files:
            try:
                # not read_table: it imports pandas, which the launcher would have to wait for
                with pq.ParquetFile(file) as parquet:
                    values += column_values(parquet.read([column]), column)
            except UndecodableError as error:
                fail(setting, str(file), f"row {error.row}: {column} is {error}")
            except (pa.ArrowException, OSError) as error:
                _unreadable(file, "parquet", error, setting)
        return values

    def place(row: int) -> str:
        number = bisect.bisect_right(ends, row) - 1
        return f"row {row - ends[number]} of {files[number]}"

    return Table(origin, shared, read, place)


def _unreadable(path: Path, kind: str, error: Exception, setting: str) -> NoReturn:
    reason = str(error).strip().partition("\n")[0]
    fail(setting, str(path), f"cannot be read as {kind}: {reason}")


def _json_table(path: Path, setting: str) -> Table:
    records, lines = read_json_records(path, setting)
    columns = tuple(dict.fromkeys(itertools.chain.from_iterable(records)))

    def read(column: str) -> list[Any]:
        return [record.get(column) for record in records]

    return Table(str(path), columns, read, lambda row: f"row {row} (line {lines[row]}) of {path}")


def _saved_dataset(folder: Path, split: str, setting: str) -> Table:
    """A folder that `save_to_disk` wrote."""
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(str(folder))
    except IndexError:  # of the list of its files
        fail(setting, str(folder), "has no rows")
    except (*_DAMAGED_DATASET, pa.ArrowException) as error:
        _unreadable(folder, "a saved data set", error, setting)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            fail("data.split", split, f"{folder} has {', '.join(loaded)}")
        loaded = loaded[split]
    return dataset_table(str(folder), loaded)


def dataset_table(origin: str, dataset: Any) -> Table:
    """A `datasets.Dataset`, whatever format it was left in."""
    from megatron_zero.data.arrow_values import column_values

    def read(column: str) -> list[Any]:
        return column_values(dataset.select_columns([column]).with_format("arrow")[:], column)

    return Table(origin, tuple(dataset.column_names), read, lambda row: f"row {row} of {origin}")
