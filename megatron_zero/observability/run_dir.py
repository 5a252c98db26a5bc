"""The directory a run leaves behind: its layout, and never writing over somebody's results.

    <runs_dir>/<name>/  config.yaml  environment.json  metrics.jsonl  tensorboard/  report.html
                        rollouts/step_000010.jsonl.zst  checkpoints/step_000010/
                        hf/step_000010/  eval/step_000010.json

A directory that holds results (metrics, rollouts, checkpoints, exports, evaluations) is only
continued, with `--resume`. One that holds none, because a start failed, may be started again.
What a resumed run changes in `config.yaml` or `environment.json` does not erase what they said
before: the older file stays as `config.1.yaml`, `config.2.yaml`, …

Neither torch nor anything heavy is imported: the launcher checks and writes here too.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_zero.checks import UserError
from megatron_zero.config_io import Config, dump_config
from megatron_zero.step_names import step_name

ROLLOUT_SUFFIX = ".jsonl.zst"
RESULT_FOLDERS = ("rollouts", "checkpoints", "hf", "eval")


class RunDir:
    """Where everything of a run is. Makes paths only; who writes makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.report = path / "report.html"
        self.model = path / "model"  # config and tokenizer: what the engine starts from
        self.checkpoints = path / "checkpoints"

    @classmethod
    def of(cls, config: Config) -> "RunDir":
        return cls(Path(config.run_dir))

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step_name(step)}{ROLLOUT_SUFFIX}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def hf(self, step: int) -> Path:
        return self.path / "hf" / step_name(step)

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"{step_name(step)}.json"

    def has_results(self) -> bool:
        """Whether a run got as far as leaving something that cost time."""
        metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        return metrics or any(any((self.path / folder).glob("*")) for folder in RESULT_FOLDERS)


def check_startable(path: str | Path, *, resume: bool) -> None:
    """Refuse to start over the results of another run, or where nothing could be written.

    What a run writes in hours' time is looked at too: a file where the checkpoints go, or a folder
    of somebody else, would otherwise be found when there is something to lose.

    Raises:
        ValueError: results are there and `resume` is not set; `path`, or a folder in it, is a file
            or cannot be written.
    """
    run_dir = RunDir(Path(path))
    with _errors_named(run_dir.path):
        if run_dir.path.exists() and not run_dir.path.is_dir():
            raise UserError(f"run directory {path}: is a file")
        for folder in (run_dir.path / name for name in (*RESULT_FOLDERS, "model", "tensorboard")):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"run directory {path}: its {folder.name} is a file")
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                raise UserError(f"run directory {path}: its {folder.name} cannot be written")
        has_results = run_dir.has_results()
    if not resume and has_results:
        raise UserError(
            f"run directory {path}: holds the results of a run; continue it with --resume, start "
            "another with name=<another name> or --run-dir, or delete it"
        )


def create_run_dir(
    config: Config, *, resume: bool, environment: Mapping[str, Any] | None = None
) -> RunDir:
    """Make (or, with `resume`, continue) the directory `config.run_dir`; for one rank to call.

    `resume` where nothing is there yet starts a new run, so that a job which is put back in the
    queue can use one command.

    Args:
        config: written as `config.yaml`, which can be run again.
        environment: written as `environment.json` (see `environment.collect_environment`); None:
            not written.

    Raises:
        ValueError: as `check_startable`, or the directory cannot be made.
    """
    check_startable(config.run_dir, resume=resume)
    run_dir = RunDir.of(config)
    with _errors_named(run_dir.path):
        run_dir.path.mkdir(parents=True, exist_ok=True)
        keep_old = run_dir.has_results()
        _write(run_dir.config, dump_config(config), keep_old)
        if environment is not None:
            text = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
            _write(run_dir.environment, text, keep_old)
    return run_dir


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Say which settings a run directory that cannot be made comes from, and what is in the way."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        in_the_way = [str(above) for above in path.parents if os.path.isfile(above)]
        if in_the_way:
            where = f" ({in_the_way[0]} is a file)"
        settings = "runs_dir and name, or --run-dir, say where it is"
        reason = f"cannot be made or written: {error.strerror}{where}"
        raise UserError(f"run directory {path}: {reason}; {settings}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either complete or not there; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _write(path: Path, text: str, keep_old: bool) -> None:
    if keep_old and path.exists() and path.read_text(encoding="utf-8") != text:
        numbered = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
        # not a rename: another rank may be reading it
        shutil.copy2(path, next(old for old in numbered if not old.exists()))
    write_atomically(path, text.encode("utf-8"))
