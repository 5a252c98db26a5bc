"""A job of several hosts ends when one of them is lost, with its name.

A host that loses its power or its network closes no connection, so the others' collectives would
wait for it as long as for one that is slow: an hour. One process of each host therefore counts up
in the job's store and reads the others' counts. Whoever stands still for too long is lost, and this
process ends, which torchrun takes as the job's failure.

A host on which a rank fails says so in the same store, before it ends; the others end with what
that rank said, and need not wait for its silence.
"""

import atexit
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from megatron_zero import failures
from megatron_zero.failures import CRASH, Failure

_INTERVAL_S = 2.0
_DONE = b"done"
_FIRST = "first"  # of the failures of a job
_ANSWER_S = 10.0  # of the store
_HEARD_S = 20.0  # for hosts that have joined and still import


def watch_hosts(max_silence_s: float) -> None:
    """Watch from the first process of each host; nothing on a single host.

    Called once by every rank when the process group exists; reads torchrun's variables. Two
    threads: where the lost host kept the store itself, asking it does not return.

    Args:
        max_silence_s: a host that was not heard of for so long is lost.
    """
    env = os.environ
    if num_hosts() == 1 or env["LOCAL_RANK"] != "0":
        return
    own, head, name = env["GROUP_RANK"], env["MASTER_ADDR"], socket.gethostname()
    keys = [str(host) for host in range(int(env["GROUP_WORLD_SIZE"]))]
    job = dist.TCPStore(head, int(env["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"hosts/{env['TORCHELASTIC_RESTART_COUNT']}", job)
    said = dict.fromkeys(keys, b"")
    heard = dict.fromkeys(keys, time.monotonic())
    ended = threading.Event()

    def exchange() -> None:
        before = ""
        for count in itertools.count():
            now = f"{name}, count {count}"
            store.compare_set(own, before, now)  # does not take back that this host is done
            before = now
            for host, word in zip(keys, store.multi_get(keys), strict=True):
                if word != said[host] or word == _DONE:
                    said[host], heard[host] = word, time.monotonic()
            if ended.wait(_INTERVAL_S):
                return

    def judge() -> None:
        while not (lost := [h for h in keys if time.monotonic() - heard[h] > max_silence_s]):
            if ended.wait(1):
                return
        names = ", ".join(said[host].decode().split(",")[0] for host in lost)
        if own in lost:  # the store did not answer: nobody is heard of
            names = f"{head}, or the network of this host"
        message = f"host lost: {names} (on {name}: silent for {max_silence_s:.0f} s)"
        print(message, file=sys.stderr, flush=True)
        os._exit(CRASH)

    def end() -> None:
        ended.set()
        for thread in threads:  # one that is in the store while Python is taken down aborts
            thread.join(_INTERVAL_S)
        store.set(own, _DONE)

    threads = [threading.Thread(target=work, daemon=True) for work in (exchange, judge)]
    for thread in threads:
        thread.start()
    atexit.register(end)


def num_hosts() -> int:
    """Machines of this job, as torchrun counts them."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def watch_failures() -> None:
    """End this process when a rank of another host has failed, with what that rank said.

    From before the job is joined, where those that are there wait for those that will not come.
    Called once by every rank; nothing on a single host.
    """
    if num_hosts() == 1 or os.environ["LOCAL_RANK"] != "0":
        return
    store = _failure_store()
    ended = threading.Event()

    def watch() -> None:
        with contextlib.suppress(dist.DistError):  # a store that is gone is `watch_hosts`' matter
            while not store.check([_FIRST]):
                if ended.wait(_INTERVAL_S):
                    return
            first = Failure(**json.loads(store.get(_FIRST)))
            failures.tell(first.sentence, first.status)  # `first_failure` puts in that rank's name
            os._exit(first.status)

    def end() -> None:
        ended.set()
        thread.join(_INTERVAL_S)  # in the store while Python is taken down, it would abort

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    atexit.register(end)


def first_failure(failure: Failure) -> Failure:
    """Tell all hosts of a failure; returns the first one of the job, which caused the others.

    The failure itself where the store does not answer any more. The store ends with the
    host that keeps it, so each waits for the others to hear of it, but not for ever.
    """
    with contextlib.suppress(dist.DistError):
        store = _failure_store()
        text = json.dumps(dataclasses.asdict(failure))
        first = Failure(**json.loads(store.compare_set(_FIRST, "", text)))
        store.set(f"heard/{os.environ['GROUP_RANK']}", _DONE)
        everyone = [f"heard/{other}" for other in range(num_hosts())]
        end = time.monotonic() + _HEARD_S
        while not store.check(everyone) and time.monotonic() < end:
            time.sleep(_INTERVAL_S / 4)
        return first
    return failure


def _failure_store() -> dist.PrefixStore:
    env = os.environ
    limit = datetime.timedelta(seconds=_ANSWER_S)
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    job = dist.TCPStore(*address, is_master=False, timeout=limit)
    return dist.PrefixStore(f"failures/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", job)
