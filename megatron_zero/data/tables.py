"""One view of everything that has columns: parquet, JSON, folders and the hub.

A `Table` knows its column names at once and reads a column when asked, so that a corpus with many
columns costs only those that are used. Keys may be paths into nested columns: `extra_info.question`
or `prompt.0.content` read the formats of other trainers as they are.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zero.config import fail
from megatron_zero.config_data import FILE_SUFFIXES

_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns of equal length. `origin` says where it was found, for messages."""

    origin: str
    columns: tuple[str, ...]
    read: Callable[[str], list[Any]]

    def has(self, key: str) -> bool:
        """Whether `key` is a column, or a path that starts with one."""
        return key in self.columns or key.split(".")[0] in self.columns

    def values(self, key: str, setting: str) -> list[Any]:
        """One value per row; None where a nested path leads nowhere.

        Raises:
            ValueError: no such column; names `setting`, the columns there are and the nearest one.
        """
        if key in self.columns:
            return self.read(key)
        column, *path = key.split(".")
        if column not in self.columns:
            there = f"{', '.join(self.columns)}{did_you_mean(key, self.columns)}"
            fail(setting, key, f"no such column in {self.origin}; it has {there}")
        return [_descend(value, path) for value in self.read(column)]


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


def open_table(path: Path, split: str, setting: str) -> Table:
    """A file (`FILE_SUFFIXES`), a folder of parquet files, or one made by `save_to_disk`.

    Args:
        split: which part of a folder that has several: a `DatasetDict`, or files named after them.
        setting: what the path was given as, for error messages.

    Raises:
        ValueError: nothing there that can be read, or no such split.
    """
    if path.is_dir():
        return _open_folder(path, split, setting)
    if not path.is_file():
        fail(setting, str(path), "no such file or folder")
    if path.suffix == ".parquet":
        return _parquet_table(str(path), [path])
    if path.suffix in FILE_SUFFIXES:
        return _json_table(path, setting)
    fail(setting, str(path), f"must be a folder or end in one of {', '.join(FILE_SUFFIXES)}")


def _open_folder(folder: Path, split: str, setting: str) -> Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        import datasets

        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                fail("data.split", split, f"{folder} has {', '.join(loaded)}")
            loaded = loaded[split]
        return dataset_table(str(folder), loaded)
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not files:
        valid = "a folder must hold parquet files, or be one written by datasets' save_to_disk"
        fail(setting, str(folder), valid)
    return _parquet_table(str(folder), _files_of_split(folder, files, split))


def _files_of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Files named `train.parquet` or `train-00000-of-00001.parquet` are a split; others are not."""
    of_file = {file: file.stem.split("-")[0] for file in files}
    if split in of_file.values():
        return [file for file in files if of_file[file] == split]
    splits = {name for name in of_file.values() if name in _SPLIT_NAMES}
    if splits:
        fail("data.split", split, f"{folder} has {', '.join(sorted(splits))}")
    return files


def _parquet_table(origin: str, files: list[Path]) -> Table:
    import pyarrow.parquet as pq

    names = [pq.read_schema(file).names for file in files]
    shared = tuple(name for name in names[0] if all(name in others for others in names))

    def read(column: str) -> list[Any]:
        tables = (pq.read_table(file, columns=[column]) for file in files)
        return [value for table in tables for value in table[column].to_pylist()]

    return Table(origin, shared, read)


def _json_table(path: Path, setting: str) -> Table:
    records = _json_records(path, setting)
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return Table(str(path), columns, lambda column: [record.get(column) for record in records])


def _json_records(path: Path, setting: str) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            records = json.load(file)
            if not isinstance(records, list):
                fail(setting, str(path), "must be a list of objects (one per line: name it .jsonl)")
        for number, line in enumerate(file, start=1):  # none are left of a .json
            try:
                records += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                fail(setting, str(path), f"line {number} is not JSON: {error}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            fail(setting, str(path), f"record {number} is {type(record).__name__}, not an object")
    return records


def dataset_table(origin: str, dataset: Any) -> Table:
    """A `datasets.Dataset`."""
    columns = tuple(dataset.column_names)
    return Table(origin, columns, lambda column: dataset.select_columns([column])[:][column])
