"""How a process ends that cannot go on: a user's mistake in one sentence, a crash in full.

    status 2        a user's mistake (`checks.UserError`): `error: <sentence>`, and no traceback
    status 1        a crash: the traceback, then `error: <type>: <message>`
    status 128 + n  ended by signal n, as a shell counts

A rank of a job also leaves what it has to say in the file that torchrun names for it. Under our
torchrun (`megatron_zero.torchrun`) it prints nothing, because the ranks that lose it would print
the consequences: that process chooses the cause, and prints it last. Standard library only.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

from megatron_zero.checks import UserError

CRASH, MISTAKE = 1, 2
TOLD_BY_TORCHRUN = "MEGATRON_ZERO_TOLD_BY_TORCHRUN"  # set: what ranks say is printed by torchrun
_FILE = "TORCHELASTIC_ERROR_FILE"
_OURS = "megatron_zero"  # our part of that file; the others are as torchrun reads them


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why one process ended."""

    status: int
    sentence: str
    traceback: str = ""  # of a crash
    rank: int = 0
    host: str = ""
    time_s: float = 0.0  # since the epoch


@contextmanager
def reported() -> Iterator[None]:
    """Around all that a process does: what it cannot go on from is reported, and ends it.

    Raises:
        SystemExit: with the statuses above.
    """
    try:
        yield
    except UserError as error:
        end(str(error), MISTAKE)
    except KeyboardInterrupt:
        if rank_of_job() is None:  # of a job torchrun says so, once
            print("ended by SIGINT", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:  # the last place where it can be told whose it was
        end(crash_sentence(error), CRASH, traceback.format_exc())


@contextmanager
def user_errors() -> Iterator[None]:
    """Around what checks a user's input and nothing else: any `ValueError` is a mistake there."""
    try:
        yield
    except ValueError as error:
        end(str(error), MISTAKE)


def crash_sentence(error: BaseException) -> str:
    """`RuntimeError: the first line of its message`."""
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def end(sentence: str, status: int, trace: str = "") -> NoReturn:
    """Say why this process ends, where it is heard, and end it."""
    tell(sentence, status, trace)
    raise SystemExit(status)


def tell(sentence: str, status: int, trace: str = "") -> None:
    """Write why this process ends to torchrun's file, and print it where nobody else does.

    A mistake is usually found by every rank at the same place: of those that print, the first one
    speaks. A crash says which rank it was.
    """
    rank = rank_of_job()
    failure = Failure(
        status=status,
        sentence=sentence,
        traceback=trace,
        rank=rank or 0,
        host=socket.gethostname(),
        time_s=time.time(),
    )
    has_file = rank is not None and _FILE in os.environ
    if has_file:
        _write(failure)  # now: while the cause is looked for, this process may be ended
    for find_cause in _cause_finders:
        failure = find_cause(failure)
    if has_file:
        _write(failure)
        if TOLD_BY_TORCHRUN in os.environ:
            return
    if failure.status == MISTAKE and rank:
        return
    sys.stdout.flush()
    name = ""
    if failure.status != MISTAKE and rank is not None:
        name = f"rank {failure.rank} ({failure.host}): "
    print(f"{failure.traceback}error: {name}{failure.sentence}", file=sys.stderr, flush=True)


def is_in_job() -> bool:
    """Whether the environment is that of a process of a job, complete or not."""
    names = os.environ
    return "TORCHELASTIC_RUN_ID" in names or ("LOCAL_RANK" in names and "WORLD_SIZE" in names)


def rank_of_job() -> Optional[int]:
    """The rank of a process of a job; None of any other, where a RANK is left over from something.

    A process that took it for its own would leave the word to a first rank that does not exist.
    """
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not is_in_job() or not rank.isdecimal() or not world_size.isdecimal():
        return None
    return int(rank) if int(rank) < int(world_size) else None


def _write(failure: Failure) -> None:
    shown = {
        "py_callstack": failure.traceback or f"error: {failure.sentence}",
        "timestamp": str(int(failure.time_s)),
    }
    content = {
        "message": {"message": failure.sentence, "extraInfo": shown},
        _OURS: dataclasses.asdict(failure),
    }
    path = Path(os.environ[_FILE])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


_cause_finders: list[Callable[[Failure], Failure]] = []


def find_causes_by(find_cause: Callable[[Failure], Failure]) -> None:
    """Before a failure is told, ask for its cause: the failure itself, or another rank's."""
    _cause_finders.append(find_cause)


def written_failure(content: dict[str, Any]) -> Optional[Failure]:
    """What a rank left in its file; None when the file is not ours: it was killed, or exited."""
    return Failure(**content[_OURS]) if _OURS in content else None
