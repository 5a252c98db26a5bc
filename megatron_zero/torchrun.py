"""torchrun, with our own report at its end.

    python -m megatron_zero.torchrun --standalone --nproc-per-node 2 -m megatron_zero.train ...

Takes torchrun's options and does what it does, in this process: it is torch's own agent, so that
signals, restarts and logs are torchrun's. What differs is what is said when a rank fails. torch's
report names a process and an exit code, after every rank's traceback; here the cause is found among
the ranks and printed last, as one line that begins with `error:`, and the status says whose it was
(`failures`).
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

from megatron_zero.failures import CRASH, MISTAKE, TOLD_BY_TORCHRUN, Failure, written_failure
from megatron_zero.quiet import silence_agent

PATIENCE_S = 20  # torchrun kills ranks that have not ended 30 s after it asked them to


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    args = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    silence_agent()
    if args.max_restarts == 0:  # else every attempt says why it failed
        os.environ[TOLD_BY_TORCHRUN] = "1"
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        return report(error.failures)
    except RendezvousError as error:
        return _report_meeting(error, args)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        print(f"ended by {name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0


def _report_meeting(error: RendezvousError, args: argparse.Namespace) -> int:
    """Of nodes that did not come together, or lost one another before the ranks started."""
    what = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
    if isinstance(error, RendezvousTimeoutError):
        what = "not all of them came in time (--rdzv-conf join_timeout)"
    _print(f"error: the job's {args.nnodes} nodes did not meet at {args.rdzv_endpoint}: {what}")
    return CRASH


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """Say why the job failed, the cause last.

    Args:
        failures: by rank, those that ended with a status that is not 0, or by a signal: the ones
            that torchrun ended because another one had failed are among them.

    Returns:
        The job's exit status.
    """
    written = []
    for _, failure in sorted(failures.items()):
        told = written_failure(failure.error_file_data)
        if told is not None:
            written.append(told)
    mistakes = [told for told in written if told.status == MISTAKE]
    if mistakes:
        # usually found by all of them; the first rank's, where it was among them
        first = mistakes[0]
        found_by = f" (found by rank {first.rank} on {first.host})" if first.rank else ""
        _print(f"error: {first.sentence}{found_by}")
        return MISTAKE
    crashes = sorted(written, key=lambda told: told.time_s)
    if crashes:
        _print(crashes[0].traceback.rstrip())
        for told in crashes[1:]:
            _print(f"afterwards rank {told.rank} on {told.host}: {told.sentence}")
    killed = _killed(failures, crashes)
    exits = {rank: f.exitcode for rank, f in failures.items() if f.exitcode > 0}
    for told in crashes:
        exits.pop(told.rank, None)
    silent = killed + [f"rank {rank} ended with status {exits[rank]}" for rank in sorted(exits)]
    if killed or not crashes:  # Python had no chance to speak: what other ranks said followed
        _print(f"error: {', '.join(silent) or 'SIGTERM to the ranks, not from torchrun'}")
    else:
        first = crashes[0]
        words = [f"rank {first.rank} on {first.host}: {first.sentence}", *silent]
        _print(f"error: {'; '.join(words)}")
    if not crashes and not killed and set(exits.values()) == {MISTAKE}:
        return MISTAKE  # options that do not exist: the parser has said so
    return CRASH


def _killed(failures: Mapping[int, ProcessFailure], crashes: Sequence[Failure]) -> list[str]:
    """Ranks that a signal ended, but not torchrun's: it sends SIGTERM, and later SIGKILL."""
    by_torchrun = {signal.SIGTERM}
    if crashes and time.time() - crashes[0].time_s > PATIENCE_S:
        by_torchrun.add(signal.SIGKILL)
    found = []
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode not in by_torchrun:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            found.append(f"rank {rank} was ended by {name}{hint}")
    return found


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
