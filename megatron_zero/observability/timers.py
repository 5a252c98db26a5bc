"""Wall-clock time of the phases of a step.

An accelerator works behind the program's back, so a phase is timed from idle to idle: the device
is synchronised where a phase starts and where it ends. On a CPU there is nothing to wait for.

    timers = Timers()
    with timers("rollout"):
        ...
    timers.pop()                                                # {"time/rollout_s": 12.3}
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def synchronize() -> None:
    """Wait for the accelerator, where one is present and in use."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Timers:
    """Seconds per phase since the last `pop`; a phase that is entered twice adds up."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, wait: Callable[[], None] = synchronize
    ) -> None:
        self._clock, self._wait = clock, wait
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body as `time/<phase>_s`, also when it raises. Phases may nest."""
        self._wait()
        start = self._clock()
        try:
            yield
            self._wait()
        finally:
            elapsed = self._clock() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def pop(self) -> dict[str, float]:
        """`time/<phase>_s` -> seconds of this rank, and start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}_s": value for phase, value in seconds.items()}
