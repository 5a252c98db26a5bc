"""A job of several hosts ends when one of them is lost, with its name.

A host that loses its power or its network closes no connection, so the others' collectives would
wait for it as long as for one that is slow: an hour. One process of each host therefore counts up
in the job's store and reads the others' counts. Whoever stands still for too long is lost, and this
process ends, which torchrun takes as the job's failure.
"""

import atexit
import itertools
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

_INTERVAL_S = 2.0
_DONE = b"done"


def watch_hosts(max_silence_s: float) -> None:
    """Watch from the first process of each host; nothing on a single host.

    Called once by every rank when the process group exists; reads torchrun's variables. Two
    threads: where the lost host kept the store itself, asking it does not return.

    Args:
        max_silence_s: a host that was not heard of for so long is lost.
    """
    env = os.environ
    if "GROUP_WORLD_SIZE" not in env or env["GROUP_WORLD_SIZE"] == "1" or env["LOCAL_RANK"] != "0":
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
        os._exit(1)

    def end() -> None:
        ended.set()
        for thread in threads:  # one that is in the store while Python is taken down aborts
            thread.join(_INTERVAL_S)
        store.set(own, _DONE)

    threads = [threading.Thread(target=work, daemon=True) for work in (exchange, judge)]
    for thread in threads:
        thread.start()
    atexit.register(end)
