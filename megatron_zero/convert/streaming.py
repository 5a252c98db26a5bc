"""A directory written file by file: it appears when it is whole, and can be continued after a kill.

Until then everything is in `<final>.incomplete`, with a journal of what the output depends on and
of every finished file with its digest. Who continues reads those files again and keeps the ones
whose digest agrees. So the journal need not be trusted, and what is written must be on the disk
only before the directory gets its name.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional, TypeVar

import xxhash
from tqdm import tqdm

from megatron_zero.checks import UserError

T = TypeVar("T")
_JOURNAL = "journal.jsonl"
_PART = 2**20
_SYNC = 128 * 2**20


class OutputFile:
    """A file in the making that knows its length and digest."""

    def __init__(
        self, path: Path, bar: "tqdm[Any]", later: Callable[[Callable[[], None]], None]
    ) -> None:
        self.path, self.size, self.hash = path, 0, xxhash.xxh3_128()
        self._file, self._bar = path.open("wb", buffering=0), bar
        self._later, self._unsynced = later, 0

    def write(self, data: "bytes | memoryview") -> None:
        """Append. In parts that stay in the processor's cache from the digest to the copy."""
        rest = memoryview(data)
        try:
            while rest:
                part = rest[: self._file.write(rest[:_PART])]
                self.hash.update(part)
                self._bar.update(len(part))
                self.size += len(part)
                self._unsynced += len(part)
                if self._unsynced >= _SYNC:  # else the disk would idle until the file is whole
                    self._unsynced = 0
                    self._later(lambda: os.fdatasync(self._file.fileno()))
                rest = rest[len(part) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


class OutputDirectory(AbstractContextManager):
    """The directory `final` in the making; a context manager.

    Args:
        final: must not exist.
        inputs: all that the output depends on; plain JSON values.
        num_bytes: of the whole output, about: for the progress bar.
        resume: continue `<final>.incomplete` if it is there.
        progress: show a bar on a terminal.

    Raises:
        ValueError: `final` exists, `<final>.incomplete` exists without `resume` or was begun from
            other inputs, or another process is writing it.
    """

    def __init__(
        self, final: Path, inputs: dict[str, Any], num_bytes: int, *, resume: bool, progress: bool
    ) -> None:
        self.final, self.partial = final, final.with_name(final.name + ".incomplete")
        if final.exists():
            raise UserError(f"{final} exists already")
        if self.partial.exists() and not resume:
            what = f"{self.partial} is left of a conversion that was interrupted"
            raise UserError(f"{what}: continue it with --resume or remove it")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._done = self._continued(inputs)
        shown = {"total": num_bytes, "desc": final.name, "unit": "B", "unit_scale": True}
        self._bar: tqdm[Any] = tqdm(**shown, disable=None if progress else True)
        self._pool = ThreadPoolExecutor(1)
        self._syncing: list[Future[None]] = []
        self._open: Optional[OutputFile] = None

    def __exit__(self, kind: Optional[type[BaseException]], *error: object) -> None:
        self._pool.shutdown()
        if self._open is not None:
            self._open.close()
        self._bar.close()
        self._journal.close()
        if kind is not None and issubclass(kind, ValueError):  # bad input: nothing to go on with
            shutil.rmtree(self.partial)

    def finished(self, name: str) -> Optional[Any]:
        """The note recorded with a file of an earlier attempt that is there unharmed, else None."""
        record, path = self._done.get(name), self.partial / name
        if record is None or not path.is_file() or path.stat().st_size != record["size"]:
            return None
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128)
        self._bar.update(record["size"])
        return record["note"] if digest.hexdigest() == record["digest"] else None

    def create(self, name: str) -> OutputFile:
        """A new file; hand it to `close` when all is written."""
        self._open = OutputFile(self.partial / name, self._bar, self._later)
        return self._open

    def close(self, file: OutputFile, note: Any) -> None:
        """Record a file as finished, with a note for whoever continues; it is synced meanwhile."""
        self._later(file.sync)
        record = {"file": file.path.name, "size": file.size, "digest": file.hash.hexdigest()}
        self._write_record({**record, "note": note})

    def finish(self) -> None:
        """Give the directory its name once all of it is on the disk."""
        for future in self._syncing:
            future.result()
        (self.partial / _JOURNAL).unlink()
        for path in [*self.partial.iterdir(), self.partial]:
            _sync(path)
        os.rename(self.partial, self.final)
        _sync(self.final.parent)

    def _later(self, action: Callable[[], None]) -> None:
        """Do it in a thread beside, in order; `finish` raises what it raises."""
        self._syncing.append(self._pool.submit(action))

    def _continued(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Records of an earlier attempt, by file; the journal is locked and made whole."""
        self._journal = (self.partial / _JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.partial} is being written by another process") from error
        self._journal.seek(0)
        # A kill may have cut the last line short.
        lines = [json.loads(line) for line in self._journal if line.endswith("\n")]
        begun, records = (lines[0], lines[1:]) if lines else (inputs, [])
        changed = [key for key in inputs if begun.get(key) != inputs[key]]
        if changed:
            what = f"{self.partial} was begun with another {' and '.join(changed)}"
            raise UserError(f"{what}: remove it to start again")
        if not records:  # nothing is known of what may be there
            for path in self.partial.iterdir():
                if path.name != _JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._journal.truncate(0)
        for record in (inputs, *records):
            self._write_record(record)
        return {record["file"]: record for record in records}

    def _write_record(self, record: dict[str, Any]) -> None:
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Any] = pool.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, items, end)
            yield item
