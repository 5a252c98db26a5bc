"""One node of a job, as the scripts of `launchers/` start it: checks, then torchrun.

    python -m megatron_zero.node <torchrun's options> -m megatron_zero.train <recipe> ...

What torchrun would say in a traceback, or not at all, is found here first, without torch where that
is possible: the run's settings, the number of processes where none is given, a results folder that
would not outlive the job, a port that something else has, a head node that is not reached. Each is
one sentence, within a minute. Then this process is the node's agent (`megatron_zero.torchrun`).
"""

import contextlib
import datetime
import errno
import importlib.util
import itertools
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence

from megatron_zero.checks import fail
from megatron_zero.failures import user_errors
from megatron_zero.launch_args import COMMANDS, count_gpus, parse_args
from megatron_zero.storage import is_under

HEAD_TIMEOUT_S = 45.0  # nodes that a scheduler starts together are not started at once
STORE_TIMEOUT_S = 5.0  # of a store that is there, to answer
_RETRY_S = 0.5
_STDERR = 2  # where C++ writes, whatever sys.stderr is
_NPROC, _ENDPOINT = "--nproc-per-node", "--rdzv-endpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then be torchrun; returns the exit status. 2: a setting is not valid."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    module = arguments.index("-m")
    options, words = arguments[:module], arguments[module + 2 :]
    kind = arguments[module + 1].rpartition(".")[2]
    with user_errors():
        if kind not in COMMANDS:
            fail("COMMAND", kind, f"must be one of {', '.join(COMMANDS)}")
        if importlib.util.find_spec("torch") is None:
            valid = "has no torch: activate the environment (make setup), or name its python"
            fail("PYTHON", sys.executable, valid)
        words = on_job_storage(kind, words)
        options = with_num_processes(options)
        check_numbers(options)
        if _ENDPOINT in options:
            check_meeting(options[options.index(_ENDPOINT) + 1])
    from megatron_zero import torchrun  # imports torch

    return torchrun.main([*options, "-m", arguments[module + 1], *words])


def on_job_storage(kind: str, words: Sequence[str]) -> list[str]:
    """The run's arguments, its run directory under the job's storage (`STORAGE`) if there is one.

    A relative `runs_dir` is one of the storage.

    Raises:
        ValueError: the arguments are not valid, there is no such storage, or the run directory lies
            elsewhere.
    """
    runs_dir = parse_args(kind, words).config.runs_dir
    storage = os.environ.get("STORAGE", "")
    if not storage:
        return list(words)
    if not os.path.isabs(storage) or not os.path.isdir(storage):
        fail("STORAGE", storage, "must be an absolute folder that is there: it outlives the job")
    if not os.access(storage, os.W_OK):
        fail("STORAGE", storage, "cannot be written to")
    moved = list(words)
    if not os.path.isabs(runs_dir):
        moved.append(f"runs_dir={os.path.normpath(f'{storage}/{runs_dir}')}")
    run_dir = parse_args(kind, moved).config.run_dir
    if not is_under(run_dir, storage):
        valid = f"must be under STORAGE={storage}: what is written elsewhere ends with the job"
        fail("runs_dir", os.path.dirname(run_dir), valid)
    return moved


def with_num_processes(options: Sequence[str]) -> list[str]:
    """torchrun's options with a number of processes: one per GPU, else one, where it is empty.

    Says what was chosen.
    """
    chosen = list(options)
    place = chosen.index(_NPROC) + 1
    if not chosen[place]:
        num_gpus = count_gpus()
        chosen[place] = str(num_gpus or 1)
        why = f"{num_gpus} processes, one per GPU" if num_gpus else "1 process, no GPU is visible"
        print(f"NPROC_PER_NODE is not set: {why}", flush=True)
    return chosen


def check_numbers(options: Sequence[str]) -> None:
    """Refuse settings of the scripts that are no whole numbers, by the scripts' names for them.

    Raises:
        ValueError: with the setting's name.
    """
    given = dict(itertools.pairwise(options))
    numbers = [
        ("NPROC_PER_NODE", given.get(_NPROC, "1"), 1),
        ("NNODES", given.get("--nnodes", "1"), 1),
        ("MAX_RESTARTS", given.get("--max-restarts", "0"), 0),
        ("JOIN_TIMEOUT_S", os.environ.get("JOIN_TIMEOUT_S") or "1", 1),
    ]
    for name, text, least in numbers:
        if not text.isdecimal() or int(text) < least:
            fail(name, text, f"must be a whole number, {least} or more")


def check_meeting(endpoint: str) -> None:
    """Refuse a place where the job's nodes could not meet.

    Args:
        endpoint: `host:port`, of the node that keeps the job's store. Jobs may share a port.

    Raises:
        ValueError: no such port, something else has it, or the host is not reached in time
            (`HEAD_TIMEOUT_S` of the environment).
    """
    host, _, port_text = endpoint.rpartition(":")
    host = host.strip("[]")
    if not port_text.isdecimal() or not 0 < int(port_text) < 2**16:
        fail("RDZV_PORT", port_text, "must be a port, 1 to 65535")
    port = int(port_text)
    if find_head(host, port, _head_timeout_s()) and not is_in_use(port):
        return
    if not is_store(host, port, STORE_TIMEOUT_S):
        valid = f"something that is not torchrun's store has this port of {host}"
        fail("RDZV_PORT", port, f"{valid}; choose a free one, the same on all nodes")


def is_this_machine(host: str) -> bool:
    """Whether one of a host's addresses is this machine's: that can be listened on."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the second: no name that can be looked up
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
            probe.bind(address)
            return True
    return False


def is_in_use(port: int) -> bool:
    """Whether the store could not listen on a port of this machine; tried as it does it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EACCES:
                fail("RDZV_PORT", port, "this user may not listen on it; choose one above 1023")
            return True
    return False


def find_head(host: str, port: int, timeout_s: float) -> bool:
    """Return when the head node is there: true where this is it, false where it is another.

    It may start after this one, and its name may be known late: its own, too, to itself.

    Raises:
        ValueError: nothing listened there in time; says why not.
    """
    end = time.monotonic() + timeout_s
    while not is_this_machine(host):
        try:
            socket.create_connection((host, port), timeout=max(_RETRY_S, timeout_s / 10)).close()
            return False
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > end:
            ask = "is it the first node's name, does that run, and has it the same RDZV_PORT?"
            waited = f"no answer on port {port} in {timeout_s:g} s"
            fail("HEAD_NODE", host, f"{waited} ({reason}): {ask}")
        time.sleep(_RETRY_S)
    return True


def _head_timeout_s() -> float:
    text = os.environ.get("HEAD_TIMEOUT_S", str(HEAD_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        fail("HEAD_TIMEOUT_S", text, "must be a number of seconds, 0 or more")
    return seconds


def is_store(host: str, port: int, timeout_s: float) -> bool:
    """Whether what listens there is a store of torch's, which answers when it is greeted.

    A process of its own greets it: torch waits for the answer for ever, and of a wrong one (a web
    server's, say) it prints a page and tries again.
    """
    from torch.distributed import TCPStore

    def greet() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
        limit = datetime.timedelta(seconds=timeout_s)
        TCPStore(host, port, is_master=False, timeout=limit)

    greeting = multiprocessing.get_context("fork").Process(target=greet, daemon=True)
    greeting.start()
    greeting.join(timeout_s)
    if greeting.is_alive():
        greeting.kill()
        greeting.join()
    return greeting.exitcode == 0


if __name__ == "__main__":
    sys.exit(main())
