r"""One verifier process: reads (answer, golds) lines, writes one outcome line each.

Started by `verifier_pool` as `python -m megatron_zero.rewards.worker`. It is a fresh process and
imports neither torch nor anything else heavy, since the trainer it serves is too large, and has too
many threads, to fork.

    in    ["1/2", ["0.5", "\\frac12"]]      JSON, one item per line
    out   ready                             once, after the imports
          correct | wrong | crash           per item; followed by " retire" if the worker should
                                            not be given another

Limits, besides the wall clock that the pool keeps: address space above what the process has at
its start, CPU time per item, and the life of the parent.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time

from megatron_zero.rewards.equivalence import is_equivalent

MIB = 2**20
_PR_SET_PDEATHSIG = 1


def address_space_bytes() -> int:
    """Size of this process's address space, what RLIMIT_AS limits."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit(kind: int, bound: int) -> int:
    """Bound a resource of this process, its own hard limit permitting; returns what it became."""
    hard = resource.getrlimit(kind)[1]
    bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
    resource.setrlimit(kind, (bound, hard))
    return bound


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, also in the middle of an item."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call
        sys.exit(0)


def grade_line(line: bytes) -> str:
    """The outcome of one item: "correct", "wrong", or "crash" when memory ran out."""
    try:
        answer, golds = json.loads(line)
        return "correct" if is_equivalent(answer, golds) else "wrong"
    except MemoryError:
        return "crash"


def main(arguments: list[str]) -> None:
    """Serve until standard input ends. Arguments: parent pid, timeout in s, memory in MiB."""
    parent_pid, timeout_s, memory_mb = arguments
    die_with_parent(int(parent_pid))
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed must not look like a reply
    room = int(memory_mb) * MIB
    tired = limit(resource.RLIMIT_AS, address_space_bytes() + room) - room // 2
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        # ended by SIGXCPU when it has computed so much longer (and up to 2 s more)
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + float(timeout_s)) + 1)
        outcome = grade_line(line)
        retire = outcome == "crash" or address_space_bytes() > tired
        os.write(replies, f"{outcome}{' retire' if retire else ''}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
