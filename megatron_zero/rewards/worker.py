r"""One verifier process: reads (answer, golds) lines, writes one outcome line each.

Started by `verifier_pool` as `python -m megatron_zero.rewards.worker`. It is a fresh process and
imports neither torch nor anything else heavy, since the trainer it serves is too large, and has too
many threads, to fork.

    in    ["1/2", ["0.5", "\\frac12"]]      JSON, one item per line
    out   ready                             once, after the imports
          correct | wrong                   per item

Limits, besides the wall clock that the pool keeps: address space above what the process has at
its start, and the life of the parent.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

from megatron_zero.rewards.equivalence import is_equivalent


def limit_memory(room_bytes: int) -> None:
    """Bound the address space to what it is now and so much more, its hard limit permitting."""
    with open("/proc/self/statm") as statm:
        bound = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + room_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, also in the middle of an item."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:  # it ended before the call
        sys.exit(0)


def main(arguments: list[str]) -> None:
    """Serve until standard input ends. Arguments: parent pid, memory in MiB."""
    parent_pid, memory_mb = map(int, arguments)
    die_with_parent(parent_pid)
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed must not look like a reply
    limit_memory(memory_mb * 2**20)
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        verdict = is_equivalent(*json.loads(line))  # out of memory: the process ends
        os.write(replies, b"correct\n" if verdict else b"wrong\n")


if __name__ == "__main__":
    # an end of the pool while it replies is how it is stopped, and no error
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1:])
