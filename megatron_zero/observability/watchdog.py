"""A job of several hosts ends when one of them is lost, with its name.

A host that loses its power or its network closes no connection, so the others' collectives would
wait for it as long as for one that is slow: an hour. One process of each host therefore counts up
in the job's store and reads the others' counts. Whoever stands still for too long is lost, and this
process ends, which torchrun takes as the job's failure. Two threads: where the lost host kept the
store itself, asking it does not return.
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

    Called once by every rank when the process group exists; reads torchrun's variables.

    Args:
        max_silence_s: a host that was not heard of for so long is lost.
    """
    env = os.environ
    if "GROUP_WORLD_SIZE" not in env or env["GROUP_WORLD_SIZE"] == "1" or env["LOCAL_RANK"] != "0":
        return
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    job = dist.PrefixStore(f"hosts/{env['TORCHELASTIC_RESTART_COUNT']}", store)
    watch = HostWatch(job, int(env["GROUP_RANK"]), int(env["GROUP_WORLD_SIZE"]))
    exchange = threading.Thread(target=watch.exchange, daemon=True)
    exchange.start()
    judge = threading.Thread(target=watch.judge, args=(max_silence_s,), daemon=True)
    judge.start()

    def say_goodbye() -> None:
        watch.ended.set()
        exchange.join(_INTERVAL_S)
        if not exchange.is_alive():  # else nobody answers
            job.set(str(watch.own), _DONE)

    atexit.register(say_goodbye)


class HostWatch:
    """What one host knows of the others; its methods run in a thread each."""

    def __init__(self, store: dist.Store, own: int, num_hosts: int) -> None:
        self.store, self.own, self.ended = store, own, threading.Event()
        self.said = [b""] * num_hosts
        self.heard = [time.monotonic()] * num_hosts

    def exchange(self) -> None:
        """Count up, and note who else did."""
        keys = [str(host) for host in range(len(self.said))]
        for count in itertools.count():
            self.store.set(str(self.own), f"{socket.gethostname()}, count {count}")
            for host, said in enumerate(self.store.multi_get(keys)):
                if said != self.said[host] or said == _DONE:
                    self.said[host], self.heard[host] = said, time.monotonic()
            if self.ended.wait(_INTERVAL_S):
                return

    def judge(self, max_silence_s: float) -> None:
        """End this process when a host has been silent for too long."""
        while not self.ended.wait(1):
            silence = [time.monotonic() - heard for heard in self.heard]
            lost = [host for host, seconds in enumerate(silence) if seconds > max_silence_s]
            if not lost:
                continue
            names = ", ".join(self.said[host].decode().split(",")[0] for host in lost)
            if self.own in lost:  # the store did not answer: nobody is heard of
                names = f"{os.environ['MASTER_ADDR']}, or the network of this host"
            message = f"host lost: {names} (on {socket.gethostname()}: silent for "
            print(f"{message}{max_silence_s:.0f} s)", file=sys.stderr, flush=True)
            os._exit(1)
