"""Grading in supervised worker processes: no response can hurt the run or another response.

Model text is hostile input to a checker: in the reference implementation one `\\boxed{9**9**9**9}`
occupies a worker for good, and after as many of them as there are workers every later response
scores 0. Here no answer is known that takes a worker long (`equivalence`), and if one does, the
worker has a deadline for each item: one that misses it is killed and replaced, and so is one that
dies or runs out of memory. Items are written ahead to a worker; those behind the one at which it
fails are given to its successor.

    outcome      what happened
    correct      equivalent to one of the golds
    wrong        an answer, but not equivalent
    unparsable   no answer in the response
    timeout      the worker did not finish within timeout_s
    crash        the worker died or ran out of memory

Finding the answer in the response is linear and done here. So a response of megabytes costs its
search and nothing else, and what is sent to a worker is at most `MAX_EXTRACTED_CHARS` long.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Optional

import megatron_zero
from megatron_zero.config import ANSWER_FORMATS, fail
from megatron_zero.rewards import votes
from megatron_zero.rewards.base import verdict
from megatron_zero.rewards.equivalence import Gold, gold_texts
from megatron_zero.rewards.math import find_answer
from megatron_zero.types import Graded

START_TIMEOUT_S = 120.0  # imports take a moment; file systems of clusters can be slow
MAX_START_FAILURES = 3  # in a row
# The worker's whole environment: nothing of torchrun's, CUDA's or NCCL's.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")

_CHUNK_ITEMS, _CHUNK_BYTES = 32, 30_000  # given to a worker at once; a pipe holds 64 KiB

_Item = tuple[Optional[str], tuple[str, ...]]  # answer, golds


class VerifierPool(contextlib.AbstractContextManager):
    """Grades responses in `num_workers` processes; one pool per rank, usable from any thread.

    A thread per worker waits for it. Workers die with the thread that started them: the first ones
    with the one that makes the pool.

    Args:
        num_workers: processes, started here and replaced when they fail.
        timeout_s: wall-clock seconds one item may take, from when its worker turns to it.
        memory_mb: MiB of address space a worker may add to what it has after its imports.
        answer_format: where answers are found: "boxed" or "answer_tag" (see `rewards.math`).

    Example:
        with VerifierPool(num_workers=1, timeout_s=5.0, memory_mb=1024) as pool:
            graded = pool.grade([("so \\boxed{0.5}", "1/2")])  # one Graded, outcome "correct"

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self, num_workers: int, timeout_s: float, memory_mb: int, answer_format: str = "boxed"
    ) -> None:
        if answer_format not in filter(None, ANSWER_FORMATS):
            fail("answer_format", answer_format, f"must be one of {ANSWER_FORMATS[1:]}")
        sizes = {"num_workers": num_workers, "timeout_s": timeout_s, "memory_mb": memory_mb}
        for name, size in sizes.items():
            if not size > 0:
                fail(name, size, "must be above 0")
        self.answer_format = answer_format
        command = worker_command(memory_mb)
        self._workers = [_Worker(command, timeout_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers)
        self._closed = False

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, when those that an interrupted call left busy have ended their item."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes at this moment."""
        return tuple(worker.process.pid for worker in self._workers)

    def grade(self, items: Sequence[tuple[str, Gold]]) -> list[Graded]:
        """Grade (response text, gold answer or several) pairs; results in the same order.

        Equal answers to the same golds are graded once. Rewards are before the rule for truncated
        responses (`apply_truncation`).

        Raises:
            ValueError: if the pool is closed, or a gold answer is none.
            RuntimeError: if workers cannot be started.
        """
        if self._closed:
            raise ValueError("the verifier pool is closed")
        found: list[tuple[bool, _Item]] = []
        for response, gold in items:
            formatted, answer = find_answer(response, self.answer_format)
            found.append((formatted, (answer, tuple(gold_texts(gold)))))
        outcomes = self._decide([item for _, item in found if item[0] is not None])
        return [verdict(formatted, outcomes.get(item, "unparsable")) for formatted, item in found]

    def answer_classes(self, groups: Sequence[Sequence[str]]) -> list[list[Optional[int]]]:
        """Which responses of a group give the same answer, as the verifier sees it.

        Args:
            groups: of each problem, the texts of its responses.

        Returns:
            The number of its class for each response, None without an answer: see `votes`.

        Raises:
            ValueError, RuntimeError: as `grade`.
        """
        if self._closed:
            raise ValueError("the verifier pool is closed")
        answers = []
        for group in groups:
            answers.append([find_answer(text, self.answer_format)[1] for text in group])
        items: list[_Item] = []
        for group in answers:
            items += [(one, (other,)) for one, other in votes.pairs_to_compare(group)]
        outcomes = self._decide(items)
        equal = {(one, golds[0]) for (one, golds), o in outcomes.items() if o == "correct"}
        return [votes.answer_classes(group, equal) for group in answers]

    def _decide(self, items: Sequence[_Item]) -> dict[_Item, str]:
        """The outcome of each different item; the workers share them."""
        waiting = list(dict.fromkeys(items))
        size = min(_CHUNK_ITEMS, -(-len(waiting) // (4 * len(self._workers))))
        chunks = [waiting[i : i + size] for i in range(0, len(waiting), size or 1)]
        outcomes: dict[_Item, str] = {}
        for chunk, results in zip(chunks, self._threads.map(self._outcomes, chunks), strict=True):
            outcomes |= zip(chunk, results, strict=True)
        return outcomes

    def _outcomes(self, items: list[_Item]) -> list[str]:
        worker = self._idle.get()
        try:
            return worker.outcomes(items)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process at a time, replaced when it fails."""

    def __init__(self, command: list[str], timeout_s: float) -> None:
        self._command, self._timeout_s = command, timeout_s
        self._start()

    def outcomes(self, items: list[_Item]) -> list[str]:
        """Have items graded, written ahead; one at which the process fails costs no other."""
        lines = [json.dumps(item) + "\n" for item in items]
        found: list[str] = []
        while len(found) < len(items):
            self._make_ready()
            reusable = False
            try:
                end = len(found) + 1
                while end < len(items) and sum(map(len, lines[len(found) : end])) < _CHUNK_BYTES:
                    end += 1
                data = "".join(lines[len(found) : end]).encode()
                with contextlib.suppress(BrokenPipeError):  # it just ended: seen as no reply
                    while data:
                        data = data[self.process.stdin.write(data) :]
                for _ in range(len(found), end):
                    reusable = False
                    found.append(self._reply(self._timeout_s))
                    reusable = found[-1] in ("correct", "wrong")
                    if not reusable:
                        break
            finally:
                if not reusable:
                    self._replace()
        return found

    def _make_ready(self) -> None:
        for _ in range(MAX_START_FAILURES):
            if self._ready and self.process.poll() is None:
                return
            reply = "crash" if self._ready else self._reply(START_TIMEOUT_S)
            self._ready = reply == "ready"
            if not self._ready:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reply += f", exit status {self.process.wait(1)}"
                self._replace()
        if not self._ready:
            command = " ".join(self._command)
            raise RuntimeError(f"verifier workers do not start ({reply}); command: {command}")

    def _reply(self, timeout_s: float) -> str:
        """The next line, which is written at once, or why there is none: "timeout" or "crash"."""
        if not wait([self.process.stdout], timeout_s):
            return "timeout"
        return self.process.stdout.readline().decode().strip() or "crash"

    def _start(self) -> None:
        # No preexec_fn: without one CPython uses vfork, which copies nothing of the parent.
        self.process = subprocess.Popen(
            self._command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self._ready = False

    def _replace(self) -> None:
        self.kill()
        self._start()

    def kill(self) -> None:
        """It holds nothing that would have to be saved."""
        self.process.kill()
        with self.process:  # closes its pipes and waits for it
            pass


def worker_command(memory_mb: int) -> list[str]:
    """How a worker is started; `-P` keeps the current directory out of its imports."""
    module = "megatron_zero.rewards.worker"
    return [sys.executable, "-P", "-m", module, str(os.getpid()), str(memory_mb)]


def _environment() -> dict[str, str]:
    """The worker's environment; hashing fixed, so that it decides the same way every time."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    root = str(Path(megatron_zero.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**passed_on, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
