"""torchrun, with our own report at its end.

    python -m megatron_zero.torchrun --standalone --nproc-per-node 2 -m megatron_zero.train ...

Takes torchrun's options and does what it does, in this process: it is torch's own agent, so that
signals, restarts and logs are torchrun's. What differs is what is said when a rank fails. torch's
report names a process and an exit code, after every rank's traceback; here the cause is found among
the ranks and printed last, as one line that begins with `error:`, and the status says whose it was
(`failures`).
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    with tempfile.TemporaryDirectory(prefix="megatron_zero_torchrun_") as folder:
        if args.log_dir is None:
            args.log_dir = folder  # where ranks leave why they ended: torchrun would choose one
        start_s = time.time()
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            return report(error.failures)
        except RendezvousError as error:
            return _report_meeting(error, args, written_since(Path(args.log_dir), start_s))
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            print(f"ended by {name}", file=sys.stderr, flush=True)
            return 128 + error.sigval
    return 0


def written_since(log_dir: Path, start_s: float) -> list[Failure]:
    """What this node's ranks have left of why they ended, the first one first.

    Args:
        log_dir: torchrun's; it may hold the logs of earlier jobs.
        start_s: of this job, since the epoch.
    """
    found = []
    for path in log_dir.rglob("error.json"):
        told = written_failure(json.loads(path.read_text(encoding="utf-8")))
        if told is not None and told.time_s >= start_s:
            found.append(told)
    return sorted(found, key=lambda told: told.time_s)


def _report_meeting(
    error: RendezvousError, args: argparse.Namespace, written: Sequence[Failure]
) -> int:
    """Of nodes that did not come together, or lost one another.

    The node that keeps the job's store may end first when ranks fail on all of them: then what the
    ranks here have left is the cause, and not that the store is gone.
    """
    if written:
        return _report_written(written)
    what = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
    if isinstance(error, RendezvousTimeoutError):
        what = "not all of them came in time (--rdzv-conf join_timeout)"
    met = f"did not meet at {args.rdzv_endpoint}, or lost one another"
    _print(f"error: the job's {args.nnodes} nodes {met}: {what}")
    return CRASH


def _report_written(written: Sequence[Failure]) -> int:
    """Print the cause last, of what ranks have left: a mistake before any crash."""
    for told in written:
        if told.status == MISTAKE:
            _report_mistake(told)
            return MISTAKE
    first = written[0]
    _print(first.traceback.rstrip())
    _print(f"error: rank {first.rank} on {first.host}: {first.sentence}")
    return CRASH


def _report_mistake(told: Failure) -> None:
    found_by = f" (found by rank {told.rank} on {told.host})" if told.rank else ""
    _print(f"error: {told.sentence}{found_by}")


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
        _report_mistake(mistakes[0])
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
