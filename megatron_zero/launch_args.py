"""What `megatron-zero train …` and `python -m megatron_zero.train …` both take.

The command line starts processes and each of them reads its arguments again, under torchrun, so the
arguments are declared, parsed and resolved here for both. Standard library and YAML only: a
mistake is reported in less time than importing torch takes.

    with user_errors():
        args = parse_args("train", argv)
        check_on_rank(args.config, resume=args.resume)
"""

import argparse
import functools
import gc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zero.checks import UserError, fail
from megatron_zero.config import RunConfig, replace
from megatron_zero.config_io import Config, Recipes, known_recipes, resolve
from megatron_zero.failures import (
    Failure,
    find_causes_by,
    is_in_job,
    rank_of_job,
    reported,
    user_errors,
)
from megatron_zero.hf_config import read_hf_config
from megatron_zero.layout import check_cpu_engine, check_layout
from megatron_zero.objective import PRESETS
from megatron_zero.observability.run_dir import check_startable, create_run_dir
from megatron_zero.preflight import check_files
from megatron_zero.quiet import hush

COMMANDS = {
    "train": "reinforcement learning: rollouts, rewards, policy updates",
    "pretrain": "next-token training on documents: domain pretraining, or a small base model",
}

# What torchrun tells a process about its job.
JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHECKED = "MEGATRON_ZERO_CHECKED"  # set: the launcher has checked what the run needs

_START = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchArgs:
    """One run as it was asked for, resolved and checked."""

    config: Config
    resume: bool
    nproc: int | None = None  # processes on this machine; None: not given


def make_parser(kind: str, *, launcher: bool) -> argparse.ArgumentParser:
    """The arguments of `kind`; `--nproc` only for what starts the processes (`launcher`)."""
    program = f"megatron-zero {kind}" if launcher else f"python -m megatron_zero.{kind}"
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} <recipe|file.yaml> [key=value ...] [options]",
        description=COMMANDS[kind],
        epilog="Every setting with its default: megatron_zero/config.py. Overrides are dotted, as "
        "in rollout.group_size=4 or optimizer.lr=1e-6.",
        allow_abbrev=False,
    )
    parser.set_defaults(objective=None, nproc=None)
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--run-dir", metavar="DIR", help="where the run is kept (sets runs_dir and name)")
    add("--resume", action="store_true", help="continue from the run directory's last checkpoint")
    if kind == "train":
        text = "a published objective's settings, set before the overrides: docs/objectives.md"
        add("--objective", choices=list(PRESETS), help=text)
    if launcher:
        add("--nproc", type=int, metavar="N", help="processes; default: one per GPU, else 1")
    return parser


def parse_args(
    kind: str, argv: Sequence[str], *, launcher: bool = False, recipes: Recipes | None = None
) -> LaunchArgs:
    """Parse and resolve; options and overrides may come in any order after the target.

    Args:
        kind: `train` or `pretrain`.
        argv: without the program and the command.
        launcher: whether the caller starts the processes, and so takes `--nproc`.
        recipes: name -> function; None: the package `recipes`.

    Raises:
        ValueError: a target or setting that is not valid.
        SystemExit: an option that does not exist, or `--help`.
    """
    parsed = make_parser(kind, launcher=launcher).parse_intermixed_args(list(argv))
    if not parsed.words or ("=" in parsed.words[0] and not Path(parsed.words[0]).exists()):
        names = ", ".join(sorted(known_recipes() if recipes is None else recipes)) or "none"
        raise ValueError(f"{kind}: needs a recipe or a YAML file first; recipes: {names}")
    target, *overrides = parsed.words
    config = resolve(target, overrides, kind, recipes, PRESETS.get(parsed.objective))
    if parsed.run_dir is not None:
        path = Path(parsed.run_dir)
        config = replace(config, runs_dir=str(path.parent), name=path.name)
    if parsed.nproc is not None and parsed.nproc < 1:
        raise ValueError(f"--nproc={parsed.nproc}: must be at least 1")
    return LaunchArgs(config=config, resume=parsed.resume, nproc=parsed.nproc)


def run_rank(kind: str, argv: Sequence[str] | None, run: Callable[..., None]) -> None:
    """What each rank does: check everything that can be wrong, then `run(config, resume=)`.

    Args:
        argv: None: the process's own.
    """
    with reported():
        if is_launched() and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            find_causes_by(_first_of_all_hosts)
        with user_errors():
            args = parse_args(kind, sys.argv[1:] if argv is None else argv)
            check_on_rank(args.config, resume=args.resume)
        progress("importing torch")
        run(args.config, resume=args.resume)


def _first_of_all_hosts(failure: Failure) -> Failure:
    from megatron_zero.observability.watchdog import first_failure  # torch, when it is too late

    return first_failure(failure)


def check_on_rank(config: Config, *, resume: bool) -> None:
    """Everything that can be wrong with a run, by a process of its job, before torch is imported.

    Where no launcher has done it, the first process of each machine looks at the files, and the
    first of all makes the run directory.

    Raises:
        ValueError: a setting, file, model or run directory that cannot work.
    """
    hf_config = read_hf_config(config.model)
    check_layout(config, hf_config, world_size(), node_size())
    check_engine(config, hf_config)
    if _CHECKED in os.environ or (is_launched() and os.environ["LOCAL_RANK"] != "0"):
        return
    is_first = not rank_of_job()
    if is_first:
        check_startable(config.run_dir, resume=resume)
    check_files(config)
    if is_first:
        create_run_dir(config, resume=resume)


def check_engine(config: Config, hf_config: dict[str, Any]) -> None:
    """Refuse a model that the engine of this machine lacks the kernels for; pretraining has none.

    Raises:
        ValueError: see `layout.check_cpu_engine`.
    """
    if isinstance(config, RunConfig) and not count_gpus():
        check_cpu_engine(config.model, hf_config)


def is_launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process.

    Raises:
        UserError: some of the variables are set and others are not: left over, most likely; or
            there is no such rank.
    """
    if not is_in_job():
        return False
    env = os.environ
    is_number = {name: env.get(name, "").isdecimal() for name in JOB_VARIABLES}
    is_number["MASTER_ADDR"] = bool(env.get("MASTER_ADDR"))
    wrong = [name for name, right in is_number.items() if not right]
    if wrong:
        names = [name for name in ("TORCHELASTIC_RUN_ID", *JOB_VARIABLES) if name in env]
        there = ", ".join(f"{name}={env[name]}" for name in names)
        raise UserError(
            f"environment: {there}, as in a process of a job, but {', '.join(wrong)} missing or "
            f"no number; if they are left over from something else, unset {' '.join(names)}"
        )
    if rank_of_job() is None:
        fail("RANK", int(env["RANK"]), f"must be below WORLD_SIZE={env['WORLD_SIZE']}")
    return True


def world_size() -> int:
    """Number of processes of the job that this process belongs to; 1 when nothing launched it."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def become_torchrun(module: str, arguments: Sequence[str], nproc: int) -> None:
    """Replace this process by torchrun, so that signals and the status are its own.

    What the run needs was checked here: its ranks do not do it again.
    """
    environment = dict(os.environ)
    environment[_CHECKED] = "1"
    if not count_gpus() and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = "1"  # ranks share the cores, and so does the engine
    command = [sys.executable, "-m", "megatron_zero.torchrun", "--standalone"]
    # what is after -- is not torchrun's, who would take --n for an abbreviation
    command += [f"--nproc-per-node={nproc}", "-m", "--", module, *arguments]
    os.execve(command[0], command, environment)


@contextmanager
def job() -> Iterator[None]:
    """Around a run, and its decorator: quiet packages, and a job of one where nothing started one.

    Alone, in a notebook or as `python -m megatron_zero.train`, this process is rank 0 of 1 at a
    port of its own that the system chose. The variables that others read it from are there for as
    long as the run, so that what is started later does not take itself for a part of it.
    """
    hush(on_gpu=count_gpus() > 0)
    if is_launched():
        yield
        return
    before = {name: os.environ.get(name) for name in JOB_VARIABLES}
    os.environ.update(_join_alone())
    try:
        yield
    finally:
        gc.collect()  # an engine leaves the process group when it is collected: not in the next run
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _join_alone() -> dict[str, str]:
    """Make this process a job of one; the variables that torchrun would have set."""
    import torch
    import torch.distributed as dist

    store = _own_store()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        own_keys = dist.PrefixStore(uuid.uuid4().hex, store)  # of this group, not an earlier one
        dist.init_process_group(backend, store=own_keys, rank=0, world_size=1)
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}


@functools.cache
def _own_store() -> Any:
    """The store of a job of one; it listens at a port that was free."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True)


def node_size() -> int:
    """Of those, how many run on this machine, as torchrun says; all when nothing does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if is_launched() else 1


def progress(phase: str) -> None:
    """On the first rank, a line before what may take long, with the seconds since its start."""
    if not rank_of_job():
        print(f"[{time.monotonic() - _START:5.1f} s] {phase} ...", flush=True)


def count_gpus() -> int:
    """NVIDIA GPUs that a process started here would see, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
