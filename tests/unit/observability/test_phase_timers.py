import pytest

from megatron_zero.observability.timers import Timers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_pop_starts_again():
    clock = Clock()
    timers = Timers(clock=clock)
    for seconds in (2.0, 3.0):
        with timers("rollout"):
            clock.now += seconds
    with timers("step"), timers("train"):
        clock.now += 1.0
    expected = {"time/rollout_s": 5.0, "time/train_s": 1.0, "time/step_s": 1.0}
    assert timers.pop() == expected
    assert timers.pop() == {}


def test_a_phase_that_raises_is_still_timed():
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(KeyError), timers("rollout"):
        clock.now += 4.0
        raise KeyError
    assert timers.pop() == {"time/rollout_s": 4.0}


def test_the_device_is_idle_at_both_ends():
    clock, waits = Clock(), []

    def wait():
        waits.append(clock.now)
        clock.now += 1.0  # what the device was still doing

    with Timers(clock=clock, wait=wait)("a") as _:
        pass
    timers = Timers(clock=clock, wait=wait)
    with timers("train"):
        clock.now += 2.0
    assert len(waits) == 4
    assert timers.pop() == {"time/train_s": 3.0}  # before is not counted, the end is


def test_the_default_clock_runs():
    timers = Timers()
    with timers("a"):
        sum(range(1000))
    assert 0 < timers.pop()["time/a_s"] < 5
