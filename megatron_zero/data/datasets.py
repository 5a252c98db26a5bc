"""Data sets: a name, file, folder or hub id to rows of (question, answers).

`KNOWN`, from `datasets.toml`, lists the data sets and benchmarks of the paper and their usual
stand-ins. A known name is looked for under `data.data_dir` first and on the hub only if it is not
there; so a folder with the files of `KNOWN[name].files` (parquet, JSONL, or folders written by
`save_to_disk`: the reference's own `datasets/` folder works) makes a run independent of the network
and of what a hub id holds today. Anything else is a path or a hub id, `owner/name` or
`config@owner/name`.

Two things to know about the data:

* `gsm8k` is GSM8K's training set. The reference's `gsm_8k` holds the test set as well (7473 + 1319
  rows); it is deliberately not looked for.
* Hub ids without an official upload are third-party copies (`math_lvl3to5_8k`), and some sets are
  on no hub in this form (`asdiv`): put the file under `data_dir`. Hub rows can differ in number
  from the reference's (`olympiad_bench` 674 against 675, `dapo_17k` with Chinese problems).
"""

import logging
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_zero.config import DataConfig, fail, replace
from megatron_zero.data import arithmetic
from megatron_zero.data.answers import answer_texts, question_text
from megatron_zero.data.tables import (
    FILE_SUFFIXES,
    Table,
    dataset_table,
    did_you_mean,
    open_table,
    what_is_at,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One problem. Any of `answers` counts as correct."""

    index: int  # in the data set, before anything is left out
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownDataset:
    """Where a named data set is, and which of its columns are used.

    Local files have the reference's columns (`problem`, `answer`, `answers`) or the hub's.
    """

    files: tuple[str, ...]  # under data_dir, without suffix, first found wins
    hub: str = ""  # [config@]owner/name; "": only local
    split: str = "train"
    keys: tuple[str, str] = ("problem", "answer")  # columns of question and answer on the hub
    answer_after: str = ""  # the answer is what follows the last of these


# Under data_dir, by kind; the middle one of benchmarks is the reference's.
_FOLDERS = {"train": ("train/", ""), "benchmark": ("eval/", "evaluation_suite/", "")}
_TABLES = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))


def _known(kind: str, files: list[str], **where: Any) -> KnownDataset:
    keys = {"keys": tuple(where["keys"])} if "keys" in where else {}
    found = tuple(folder + file for folder in _FOLDERS[kind] for file in files)
    return KnownDataset(files=found, **where | keys)


KNOWN = {name: _known(kind, **entry) for kind in _TABLES for name, entry in _TABLES[kind].items()}
GENERATED = ("arithmetic", "arithmetic_heldout")
BENCHMARKS = ("aime", "amc", "math", "minerva", "olympiad_bench")


def known_names() -> tuple[str, ...]:
    """Every name that `data.dataset` and `evaluation.datasets` understand."""
    return (*KNOWN, *GENERATED)


def evaluation_data(config: DataConfig, dataset: str, max_prompts: int) -> DataConfig:
    """`config` with another data set: what `load_rows` is given for a benchmark.

    A known name comes with its own split and columns; for any other, those of `config` are kept.
    """
    if dataset in known_names():
        config = replace(config, split=DataConfig().split, prompt_key="", answer_key="")
    return replace(config, dataset=dataset, max_prompts=max_prompts)


def load_rows(config: DataConfig, *, seed: int = 0, setting: str = "data.dataset") -> list[Row]:
    """The rows of `config.dataset`: the first `config.max_prompts`, or all (0).

    Answers: the list column `answers` if there is one (any counts), else `answer`, or whatever
    `config.answer_key` names; what can be one is said in `answers`. Text is stripped; nothing else
    is done to it: the float 142.0 stays "142.0", as in the reference. Rows without an answer are
    left out and counted: MATH's training set has two whose solution ends in an empty box, which an
    empty box would answer.

    Args:
        seed: which problems are generated, for `arithmetic` only (`arithmetic_heldout` is fixed).
        setting: where the name was given, for error messages.

    Raises:
        ValueError: no such data set, file, split or column; a question that is no text; a value
            that cannot be an answer; no answers.
    """
    rows, num_rows = read_rows(config, seed=seed, setting=setting)
    if len(rows) < num_rows:
        left_out = f"{num_rows - len(rows)} of {num_rows} rows left out, without answer"
        logger.warning("%s: %s", config.dataset, left_out)
    return rows


def read_rows(
    config: DataConfig, *, seed: int = 0, setting: str = "data.dataset"
) -> tuple[list[Row], int]:
    """`load_rows` without a word in the log, and how many rows there were with or without answer.

    Raises:
        ValueError: as `load_rows`.
    """
    name = config.dataset
    if name in GENERATED:
        rows = _generated_rows(config, seed)
        return rows, len(rows)
    entry = _entry(config)
    table = _find(config, entry, setting)
    prompt_key = config.prompt_key or _first(table, (entry.keys[0], "problem"))
    answer_key = config.answer_key or _first(table, ("answers", entry.keys[1], "answer"))
    questions = table.values(prompt_key, "data.prompt_key")
    answers = table.values(answer_key, "data.answer_key")
    if not questions:
        fail(setting, name, f"{table.origin} has no rows")
    num_rows = min(len(questions), config.max_prompts or len(questions))
    rows = []
    for i in range(num_rows):
        place, after = table.place(i), entry.answer_after
        question = question_text(questions[i], prompt_key, place)
        row_answers = answer_texts(answers[i], answer_key, place, answer_after=after)
        if row_answers:
            rows.append(Row(index=i, question=question, answers=row_answers))
    if not rows:
        fail("data.answer_key", answer_key, f"none of {num_rows} rows of {table.origin} has one")
    return rows, num_rows


def _generated_rows(config: DataConfig, seed: int) -> list[Row]:
    if config.dataset == "arithmetic":
        num_rows = config.max_prompts or arithmetic.NUM_TRAIN_ROWS
        problems = [arithmetic.problem(seed, i, config.arithmetic) for i in range(num_rows)]
    else:
        problems = arithmetic.held_out_problems(config.arithmetic)
        problems = problems[: config.max_prompts or len(problems)]
    return [
        Row(index=i, question=question, answers=(answer,))
        for i, (question, answer) in enumerate(problems)
    ]


def _first(table: Table, keys: Sequence[str]) -> str:
    """The first key that the table has; the last one, to be refused by name, if it has none."""
    return next(filter(table.has, keys), keys[-1])


def _find(config: DataConfig, entry: KnownDataset, setting: str) -> Table:
    path, hub = _locate(config, entry, setting)
    if path is not None:
        return open_table(path, entry.split, setting)
    return _hub_table(hub, entry.split, setting, config.dataset)


def is_local(config: DataConfig, setting: str = "data.dataset") -> bool:
    """Whether `load_rows` would read files of this machine; False: generated, or from the hub.

    Raises:
        ValueError: no such data set, or no such folder `data.data_dir`.
    """
    if config.dataset in GENERATED:
        return False
    path, _ = _locate(config, _entry(config), setting)
    return path is not None


def _entry(config: DataConfig) -> KnownDataset:
    if config.dataset in KNOWN:
        entry = KNOWN[config.dataset]
        if config.split not in (entry.split, DataConfig().split):
            always = f"{config.dataset} is always its split {entry.split!r}"
            fail("data.split", config.split, always)
        return entry
    return KnownDataset(files=(), split=config.split)


def _locate(config: DataConfig, entry: KnownDataset, setting: str) -> tuple[Optional[Path], str]:
    """The local path of a data set, else None and its hub id; nothing is opened."""
    name = config.dataset
    if name in KNOWN:
        path = _local_path(config.data_dir, entry)
        if path is None and not entry.hub:
            files = ", ".join(f"{file}.parquet" for file in entry.files)
            valid = f"is on no hub: set data.data_dir to a folder that has one of {files}"
            fail(setting, name, valid)
        return path, entry.hub
    path = Path(name).expanduser()
    looks_local = path.suffix in FILE_SUFFIXES or name.startswith(("/", ".", "~"))
    if name and (what_is_at(path, setting) or looks_local):
        return path, ""
    if name.rpartition("@")[2].count("/") != 1:
        valid = f"{', '.join(known_names())}, a file or folder, or a hub id (owner/name)"
        fail(setting, name, f"must be one of {valid}{did_you_mean(name, known_names())}")
    return None, name


def _local_path(data_dir: str, entry: KnownDataset) -> Optional[Path]:
    if not data_dir:
        return None
    root = Path(data_dir).expanduser()
    if what_is_at(root, "data.data_dir") != "folder":
        fail("data.data_dir", data_dir, "no such folder")
    for file in (file + suffix for file in entry.files for suffix in (*FILE_SUFFIXES, "")):
        if (root / file).exists():
            return root / file
    logger.info("%s has none of %s: trying the hub", data_dir, ", ".join(entry.files))
    return None


def _hub_table(hub: str, split: str, setting: str, name: str) -> Table:
    import datasets

    hub_config, _, hub_id = hub.rpartition("@")
    try:
        loaded = datasets.load_dataset(hub_id, hub_config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"cannot be loaded: {type(error).__name__}: {error}"
        there = f"the hub's {hub_id} (split {split!r})"
        fail(setting, name, f"not found locally (data.data_dir), and {there} {reason}")
    return dataset_table(hub_id, loaded)
