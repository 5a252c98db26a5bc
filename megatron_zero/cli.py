"""`megatron-zero <command> …`: resolve, check, then hand over to one process per accelerator.

Everything that can be wrong with a command line is found here, before a process is started and
without importing torch: the settings, the layout against the model's sizes and the number of
processes, the files of model and data, and a run directory that would be written over. Then this
process becomes torchrun, on the resolved `config.yaml` of the run directory, which is the run's
exact and repeatable command.

Under torchrun already (a launcher script, Slurm), the command runs in this process, as `analyze`
and `doctor` always do, and `eval` until it has checked its own options.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from megatron_zero.config_io import Config, changed_settings, kind_of, load_config
from megatron_zero.failures import user_errors
from megatron_zero.hf_config import read_hf_config
from megatron_zero.launch_args import (
    COMMANDS,
    LaunchArgs,
    become_torchrun,
    check_engine,
    count_gpus,
    is_launched,
    parse_args,
)
from megatron_zero.layout import check_layout
from megatron_zero.observability.run_dir import RunDir, check_startable, create_run_dir
from megatron_zero.preflight import check_files

VERBS = {
    **COMMANDS,
    "eval": "a model on benchmarks: accuracy, pass@k, intervals; or two results compared",
    "analyze": "what responses say, and the biases of a run: tables, figures, JSON",
    "doctor": "what is installed, what would run underneath, and what is wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. 2: the command line is not valid."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(_version())
        return 0
    command, *rest = arguments
    with user_errors():
        if command not in VERBS:
            near = difflib.get_close_matches(command, VERBS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{command}: no such command; {hint}commands: {', '.join(VERBS)}")
        if command in ("analyze", "doctor", "eval"):
            return importlib.import_module(f"megatron_zero.{command}").main(rest)
        if not is_launched():
            _launch(command, parse_args(command, rest, launcher=True))
            return 0
    importlib.import_module(f"megatron_zero.{command}").main(rest)
    return 0


def help_text() -> str:
    """What `megatron-zero --help` prints."""
    width = max(map(len, VERBS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return (
        "usage: megatron-zero <command> <recipe|file.yaml> [key=value ...] [options]\n\n"
        "R1-Zero-like reinforcement learning with Dr. GRPO on Megatron-Core and vLLM.\n\n"
        f"commands:\n{commands}\n\n"
        "`megatron-zero <command> --help` shows a command's options."
    )


def _launch(kind: str, args: LaunchArgs) -> None:
    """Check what was asked for and become torchrun, so that signals and the status are its own."""
    config = args.config
    nproc = args.nproc or count_gpus() or 1
    hf_config = read_hf_config(config.model)
    check_layout(config, hf_config, nproc)
    check_startable(config.run_dir, resume=args.resume)
    check_engine(config, hf_config)
    check_files(config)
    if args.resume:
        _report_changes(config)
    create_run_dir(config, resume=args.resume)
    print(f"{kind}: {config.run_dir}, {nproc} process{'es' if nproc > 1 else ''}", flush=True)
    arguments = [str(RunDir.of(config).config), *(["--resume"] if args.resume else [])]
    become_torchrun(f"megatron_zero.{kind}", arguments, nproc)


def _report_changes(config: Config) -> None:
    """Say what a resumed run does differently from the one it continues."""
    before = RunDir.of(config).config
    if not before.exists():
        return
    old = load_config(before)
    if kind_of(old) != kind_of(config):
        raise ValueError(f"{before}: is a {kind_of(old)} run, not one that this can continue")
    for path, (was, now) in changed_settings(old, config).items():
        print(f"resumed with {path}={now!r} (was {was!r})")


def _version() -> str:
    try:
        return metadata.version("megatron-zero")
    except metadata.PackageNotFoundError:
        return "not installed as a package"


if __name__ == "__main__":
    sys.exit(main())
