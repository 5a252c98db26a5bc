"""Where a launched run keeps what must outlive it, and which of its settings name files there.

A job in a container, a pod or a machine of a cloud loses what it writes outside the storage that is
mounted there, and finds only there what was put ready for it. Whoever starts such a job names a
folder of that storage: the run's relative paths are moved into it, and a path that lies elsewhere
is refused before anything is submitted.

    moved = on_storage(config, "/shared")  # {"runs_dir": "/shared/runs"}
    check_on_storage(config, written=["/shared"], read=["/shared", "/data"])
"""

import operator
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from megatron_zero.checks import fail
from megatron_zero.config import RunConfig
from megatron_zero.config_io import Config
from megatron_zero.data.datasets import known_names
from megatron_zero.data.tables import FILE_SUFFIXES


def path_settings(config: Config) -> dict[str, list[str]]:
    """Dotted setting -> the files and folders that it names; settings without any are left out.

    A model, tokenizer or data set that is named by a hub id or a known name is none.
    """
    found = {"runs_dir": [config.runs_dir]}
    names_or_paths = {"model.path": [config.model.path], "model.tokenizer": []}
    if config.model.tokenizer != "characters":
        names_or_paths["model.tokenizer"] = [config.model.tokenizer]
    if isinstance(config, RunConfig):
        found["data.data_dir"] = [config.data.data_dir]
        found["data.few_shot"] = [config.data.few_shot]
        names_or_paths["data.dataset"] = [config.data.dataset]
        names_or_paths["evaluation.datasets"] = list(config.evaluation.datasets)
    elif config.documents.source != "arithmetic":
        found["documents.source"] = [config.documents.source]
    for setting, values in names_or_paths.items():
        found[setting] = [value for value in values if is_path(value)]
    kept = {}
    for setting, values in found.items():
        paths = [value for value in values if value]
        if paths:
            kept[setting] = paths
    return kept


def is_path(name: str) -> bool:
    """Whether a model or data set is named by its file or folder, not by a hub id or known name.

    What could be either is a path if it is there on this machine.
    """
    if not name or name in known_names():
        return False
    hub_id = name.rpartition("@")[2]
    if name.startswith(("/", ".", "~")) or hub_id.count("/") > 1:
        return True
    return Path(name).suffix in FILE_SUFFIXES or Path(name).exists()


def on_storage(config: Config, folder: str) -> dict[str, str]:
    """Dotted setting -> its new value, as text, for those whose relative paths move into `folder`.

    Args:
        folder: absolute; where the job finds its storage.
    """
    moved = {}
    for setting, paths in path_settings(config).items():
        value = operator.attrgetter(setting)(config)
        old = value if isinstance(value, list) else [value]
        new = [_moved(item, folder) if item in paths else item for item in old]
        if new != old:
            moved[setting] = ",".join(new)
    return moved


def _moved(path: str, folder: str) -> str:
    if path.startswith(("/", "~")):
        return path
    return os.path.normpath(f"{folder}/{path}")


def check_on_storage(config: Config, *, written: Sequence[str], read: Sequence[str]) -> None:
    """Refuse a run that would write or look for something outside the storage of its job.

    Args:
        written: absolute folders that are mounted to be written: the run directory must lie under
            one of them.
        read: the same, for what is only read (data, model, tokenizer, documents).

    Raises:
        ValueError: with the setting, its value and the folders that are mounted.
    """
    for setting, paths in path_settings(config).items():
        mounted = written if setting == "runs_dir" else read
        for path in paths:
            if not any(is_under(path, folder) for folder in mounted):
                lost = "what is written there ends with the job"
                if setting != "runs_dir":
                    lost = "the job does not have it"
                there = ", ".join(mounted) or "none is mounted"
                fail(setting, path, f"must be on storage that is mounted ({there}): {lost}")


def is_under(path: str, folder: str) -> bool:
    """Whether an absolute `path` is `folder` or lies in it; `..` is followed, links are not."""
    path = os.path.normpath(path)
    return os.path.isabs(path) and PurePosixPath(path).is_relative_to(os.path.normpath(folder))
