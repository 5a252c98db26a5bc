"""Grading in supervised worker processes: no response can hurt the run or another response.

Model text is hostile input to a checker: in the reference implementation one `\\boxed{9**9**9**9}`
occupies a worker for good, and after as many of them as there are workers every later response
scores 0. Here each worker has one item at a time and a deadline for it; a worker that misses it is
killed and replaced, and so is one that dies or runs out of memory.

    outcome      what happened
    correct      equivalent to one of the golds
    wrong        an answer, but not equivalent
    unparsable   no answer in the response
    timeout      the worker did not finish within timeout_s
    crash        the worker died or ran out of memory

What is linear and trivially safe is done here: finding the answer in the response, and comparing
it letter by letter. So a response of megabytes costs its search and nothing else, and what is sent
to a worker is at most `MAX_ANSWER_CHARS` long.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Optional

import megatron_zero
from megatron_zero.config import ANSWER_FORMATS
from megatron_zero.rewards.base import apply_truncation
from megatron_zero.rewards.math import find_answer
from megatron_zero.rewards.normalize import MAX_ANSWER_CHARS
from megatron_zero.types import Graded

START_TIMEOUT_S = 120.0  # importing sympy takes a second; file systems of clusters can be slow
MAX_START_FAILURES = 3  # in a row
# The worker's whole environment: nothing of torchrun's, CUDA's or NCCL's.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")

_Item = tuple[str, tuple[str, ...]]  # answer, golds

__all__ = ["VerifierPool", "apply_truncation"]


class VerifierPool:
    """Grades responses in `num_workers` processes; one pool per rank.

    To be used from one thread, which must live as long: workers die with the thread that started
    them.

    Args:
        answer_format: where answers are found: "boxed" or "answer_tag" (see `rewards.math`).
        num_workers: processes, started here and replaced when they fail.
        timeout_s: wall-clock seconds one item may take, from when it is given to a worker.
        memory_limit_mib: address space a worker may add to what it has after its imports.

    Example:
        with VerifierPool("boxed", num_workers=1, timeout_s=5.0, memory_limit_mib=1024) as pool:
            graded = pool.grade([("so \\boxed{0.5}", ("1/2",))])  # one Graded, outcome "correct"

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self, answer_format: str, *, num_workers: int, timeout_s: float, memory_limit_mib: int
    ) -> None:
        if answer_format not in ANSWER_FORMATS:
            raise ValueError(f"answer_format={answer_format!r}: must be one of {ANSWER_FORMATS}")
        for name, value in (("num_workers", num_workers), ("memory_limit_mib", memory_limit_mib)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}: must be above 0")
        self.answer_format = answer_format
        self.timeout_s = timeout_s
        self._command = worker_command(timeout_s, memory_limit_mib)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._start_failures = 0
        self._closed = False
        for _ in range(num_workers):
            self._start()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. They hold nothing, so they are killed."""
        for worker in list(self._workers):
            self._discard(worker)
        self._selector.close()
        self._closed = True

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes at this moment."""
        return tuple(worker.process.pid for worker in self._workers)

    def grade(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Graded]:
        """Grade (response text, answers of which any counts) pairs; results in the same order.

        Equal answers to the same golds are graded once. Rewards are before the rule for truncated
        responses (`apply_truncation`).

        Raises:
            ValueError: if the pool is closed, or answers are a string instead of a sequence.
            RuntimeError: if workers cannot be started.
        """
        if self._closed:
            raise ValueError("the verifier pool is closed")
        results: list[Optional[Graded]] = []
        waiting: dict[_Item, list[int]] = {}
        for index, (response, answers) in enumerate(items):
            if isinstance(answers, str):
                raise ValueError(f"answers={answers!r}: must be a sequence of strings")
            formatted, answer = find_answer(response, self.answer_format)
            golds = tuple(str(gold).strip() for gold in answers)
            outcome = _trivial_outcome(answer, golds)
            results.append(_graded(formatted, outcome) if outcome else None)
            if not outcome:
                shorter = tuple(gold for gold in golds if len(gold) <= MAX_ANSWER_CHARS)
                waiting.setdefault((str(answer), shorter), []).append(index)
        for item, outcome in self._grade_answers(deque(waiting)).items():
            for index in waiting[item]:
                results[index] = _graded(True, outcome)
        return [graded for graded in results if graded is not None]

    def _grade_answers(self, queue: "deque[_Item]") -> dict[_Item, str]:
        """Keep every worker busy until all items have an outcome."""
        outcomes: dict[_Item, str] = {}
        num_items = len(queue)
        try:
            while len(outcomes) < num_items:
                for worker in list(self._workers):
                    if worker.idle and queue:
                        self._give(worker, queue)
                self._wait(outcomes)
        finally:
            for worker in list(self._workers):
                if worker.item is not None:  # interrupted: its answer must not be read as another's
                    self._replace(worker)
        return outcomes

    def _give(self, worker: "_Worker", queue: "deque[_Item]") -> None:
        if worker.process.poll() is not None:  # ended while it had nothing to do
            self._replace(worker)
            return
        worker.item = queue.popleft()
        worker.deadline = time.monotonic() + self.timeout_s
        with contextlib.suppress(BrokenPipeError):  # it just ended: seen as the end of its output
            worker.stdin.write(json.dumps(worker.item).encode() + b"\n")
            worker.stdin.flush()

    def _wait(self, outcomes: dict[_Item, str]) -> None:
        """Wait for a reply, a death or a deadline, and deal with it."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout):
            self._receive(key.data, outcomes)
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.deadline is not None and now >= worker.deadline:
                self._fail(worker, "timeout", outcomes)

    def _receive(self, worker: "_Worker", outcomes: dict[_Item, str]) -> None:
        data = os.read(worker.stdout.fileno(), 4096)
        if not data:
            out_of_time = worker.process.wait() == -signal.SIGXCPU
            self._fail(worker, "timeout" if out_of_time else "crash", outcomes)
            return
        worker.received += data
        if not worker.received.endswith(b"\n"):
            return
        outcome, _, retire = worker.received.decode().strip().partition(" ")
        worker.received, worker.deadline = b"", None
        if worker.item is not None:
            outcomes[worker.item] = outcome
        worker.item, worker.ready = None, True
        self._start_failures = 0
        if retire:
            self._replace(worker)

    def _fail(self, worker: "_Worker", outcome: str, outcomes: dict[_Item, str]) -> None:
        """A worker missed its deadline or died, with an item, without one, or while starting."""
        if worker.item is not None:
            outcomes[worker.item] = outcome
        elif not worker.ready:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                raise RuntimeError(
                    f"verifier workers do not start ({outcome}, exit status "
                    f"{worker.process.poll()}); command: {' '.join(self._command)}"
                )
        self._replace(worker)

    def _replace(self, worker: "_Worker") -> None:
        self._discard(worker)
        self._start()

    def _start(self) -> None:
        worker = _Worker(self._command)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _discard(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.stdout)
        worker.kill()


class _Worker:
    """One process, and the item it has."""

    def __init__(self, command: list[str]) -> None:
        # No preexec_fn: without one CPython uses vfork, which copies nothing of the parent.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.item: Optional[_Item] = None
        self.received = b""
        self.deadline: Optional[float] = time.monotonic() + START_TIMEOUT_S

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # an unsent item
            self.stdin.close()


def worker_command(timeout_s: float, memory_limit_mib: int) -> list[str]:
    """How a worker is started; `-P` keeps the current directory out of its imports."""
    module = "megatron_zero.rewards.worker"
    limits = [str(os.getpid()), str(timeout_s), str(memory_limit_mib)]
    return [sys.executable, "-P", "-m", module, *limits]


def _environment() -> dict[str, str]:
    """The worker's environment; hashing fixed, so that sympy decides the same way every time."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    root = str(Path(megatron_zero.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**passed_on, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}


def _trivial_outcome(answer: Optional[str], golds: tuple[str, ...]) -> Optional[str]:
    """What needs no worker: no answer, the gold's own text, or too long for anything else."""
    if answer is None:
        return "unparsable"
    if answer and answer in golds:
        return "correct"
    return "wrong" if not answer or len(answer) > MAX_ANSWER_CHARS else None


def _graded(formatted: bool, outcome: str) -> Graded:
    correct = outcome == "correct"
    return Graded(reward=float(correct), correct=correct, formatted=formatted, outcome=outcome)
