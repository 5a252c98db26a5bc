"""Where metrics go: `metrics.jsonl` always, and the console, TensorBoard and W&B when wanted.

Only rank 0 has sinks; the other ranks get an empty set and call the same methods. A resumed run
repeats the steps after its last checkpoint, so `metrics.jsonl` and TensorBoard drop what was
recorded from the resumed step on: a file that was resumed reads like one that never stopped.

`step` is the number of steps done when the values were measured: 0 before the first one. A step
may be logged in several parts (training, then evaluation); `metrics.jsonl` still holds one line
per step. Steps never go back.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from megatron_zero.checks import UserError
from megatron_zero.config import LoggingConfig, fail
from megatron_zero.observability.console import TRAIN_COLUMNS, Column, ConsoleSink
from megatron_zero.observability.run_dir import RunDir, write_atomically


class Sink(Protocol):
    """Takes the reduced values of a step; names are `group/metric`."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks(AbstractContextManager):
    """Several sinks as one; empty on every rank but the first."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_sinks(
    logging: LoggingConfig,
    run_dir: RunDir,
    rank: int,
    *,
    name: str,
    num_steps: int,
    start_step: int = 0,
    settings: Mapping[str, Any] | None = None,
    columns: Sequence[Column] = TRAIN_COLUMNS,
) -> Sinks:
    """The sinks that `logging` asks for; none on ranks other than 0.

    Args:
        name: of the run, for the console and W&B.
        num_steps: of the whole run, for progress and remaining time.
        start_step: records of this step and later are dropped: 0 for a new run, n + 1 for one that
            is resumed after n steps.
        settings: of the run, shown by W&B.
        columns: what the console shows: `TRAIN_COLUMNS` or `PRETRAIN_COLUMNS`.

    Raises:
        ValueError: a sink is asked for whose package is not installed.
    """
    if rank != 0:
        return Sinks([])
    sinks: list[Sink] = [JsonlSink(run_dir.metrics, start_step)]
    if logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir.tensorboard, start_step))
    if logging.wandb_project:
        sinks.append(WandbSink(logging.wandb_project, name, run_dir.path, settings or {}))
    if logging.console:
        sinks.append(ConsoleSink(name, num_steps, start_step=start_step, columns=columns))
    return Sinks(sinks)


class JsonlSink:
    """`metrics.jsonl`: one object per step, on disk as soon as it is logged.

    A value that is not finite is written as null. What a crash cut off in the middle of a line is
    dropped when the file is continued.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        """Continue `path`, without its records of `start_step` and later.

        Raises:
            ValueError: a line other than the last is not a record.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in _read_lines(path) if r["step"] < start_step] if path.exists() else []
        lines = [_line(record).encode("utf-8") for record in kept]
        write_atomically(path, b"".join(lines))
        self._file = path.open("r+b")
        # the record of the last step, which may still grow, and where its line starts
        self._record = kept[-1] if kept else {}
        self._line_start = sum(map(len, lines[:-1]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add `values` to the record of `step`, which is the last one logged or a later one."""
        before = self._record.get("step", -1)
        assert step >= before, f"step {step} after step {before}"
        if step > before:
            self._line_start = self._file.seek(0, os.SEEK_END)
            self._record = {"step": step}
        self._record |= values
        self._file.seek(self._line_start)
        self._file.write(_line(self._record).encode("utf-8"))
        self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`, in order; `step` is an int, null becomes nan.

    Raises:
        ValueError: a line other than the last is not a record.
    """
    return [
        {key: math.nan if value is None else value for key, value in record.items()}
        for record in _read_lines(path)
    ]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a record of metrics: {line[:80]}")
    return records


def _line(record: Mapping[str, Any]) -> str:
    plain = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(plain) + "\n"


class TensorBoardSink:
    """Scalars for TensorBoard, in `tensorboard/` of the run directory."""

    def __init__(self, path: Path, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            valid = f"needs the package tensorboard ({error}); install it or set it to false"
            fail("logging.tensorboard", True, valid)
        purge_step = start_step if path.exists() else None
        self._writer = SummaryWriter(str(path), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. A resumed run continues the same W&B run, whose id the run directory keeps.

    W&B cannot drop steps: those that a resumed run repeats are ignored there until it is past them.
    """

    def __init__(self, project: str, name: str, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            fail("logging.wandb_project", project, 'needs the package wandb; install it or set ""')
        id_file = path / "wandb_run_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        where = {"project": project, "name": name, "dir": str(path)}
        self._run = wandb.init(**where, config=dict(settings), id=run_id, resume="allow")
        write_atomically(id_file, self._run.id.encode("utf-8"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
