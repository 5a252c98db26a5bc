"""One real host process against a store in which this test plays the other host."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[3]
SILENCE_S = 3
WATCHED = """
import sys, time
from megatron_zero.observability.watchdog import watch_hosts
watch_hosts({silence})
print("watching", flush=True)
time.sleep({life})
"""


def host(store: dist.TCPStore, life_s: float, **more: str) -> subprocess.Popen:
    """The first process of host 0 of 2, as torchrun would describe it."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GROUP_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        **more,
    }
    script = WATCHED.format(silence=SILENCE_S, life=life_s)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def beat(store: dist.TCPStore, process: subprocess.Popen, num: int) -> None:
    """Count up as host 1, from when host 0 is there."""
    assert process.stdout.readline() == "watching\n"
    for count in range(num):
        store.set("hosts/0/1", f"other, count {count}")
        time.sleep(0.5)


@pytest.mark.processes
def test_a_silent_host_is_named_and_ends_the_process(store) -> None:
    process = host(store, life_s=60)
    beat(store, process, 2 * SILENCE_S + 4)  # longer than the bound: a host that counts is not lost
    assert process.poll() is None
    start = time.monotonic()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "host lost: other (on " in output
    assert time.monotonic() - start < SILENCE_S + 5


@pytest.mark.processes
def test_a_host_that_is_done_is_not_lost(store) -> None:
    process = host(store, life_s=SILENCE_S + 6)
    beat(store, process, 1)
    store.set("hosts/0/1", "done")
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    time.sleep(0.2)
    assert store.get("hosts/0/0") == b"done", "it says so itself"


@pytest.mark.processes
def test_only_the_first_process_of_a_host_watches(store) -> None:
    process = host(store, life_s=0, LOCAL_RANK="1")
    assert process.communicate(timeout=30)[0] == "watching\n"
    assert not store.check(["hosts/0/0"])
