"""The runs that `recipes.launch` starts: what each process is given, and what is checked before.

Whatever an executor mounts, a run must leave its results there: every executor but `local` has a
storage folder (`--storage`), relative paths of a run are moved into it, and a run that would write
or read elsewhere is refused here. On this machine everything outlives the job.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_zero.checks import fail
from megatron_zero.config import RunConfig
from megatron_zero.config_io import Config, apply_overrides
from megatron_zero.data.datasets import GENERATED
from megatron_zero.hf_config import read_hf_config
from megatron_zero.layout import check_layout
from megatron_zero.storage import check_on_storage, is_path, on_storage
from recipes import EXPERIMENTS, RECIPES
from recipes.hardware import MODELS, Hardware, hardware_of
from recipes.studies import Experiment

# Where the job's volume is mounted, of executors that mount one themselves.
VOLUME_FOLDER = "/shared"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run. Its processes resolve `recipe` and `overrides` to `config`."""

    recipe: str
    overrides: "list[str]"
    config: Config
    hardware: Hardware

    @property
    def name(self) -> str:
        """As schedulers allow it: letters, digits and dashes."""
        return self.config.name.replace("_", "-").lower()

    def words(self, args: argparse.Namespace) -> "list[str]":
        """The arguments of every process.

        What a scheduler starts again has to go on, not to begin.
        """
        starts_again = args.executor != "local" and args.retries > 0
        resume = ["--resume"] if args.resume or starts_again else []
        return [self.recipe, *self.overrides, *resume]


def storage_of(args: argparse.Namespace) -> str:
    """The folder, as the job sees it, of what outlives the job; "": of this machine, any.

    Raises:
        ValueError: it is needed and not given, or it is no folder of its own.
    """
    if args.executor == "slurm" and not args.storage:
        valid = "needed with --executor slurm: a folder on the cluster's shared storage"
        fail("--storage", args.storage, f"{valid}, which outlives the job's containers")
    if args.executor in ("k8s", "skypilot") and not args.volume:
        what = "a volume claim that all pods share"
        if args.executor == "skypilot":
            what = "a bucket as s3://name, or for several nodes a volume of `sky volumes`"
        valid = f"needed with --executor {args.executor}: {what}, which outlives the job"
        fail("--volume", args.volume, valid)
    if args.executor == "local":
        return os.path.abspath(args.storage) if args.storage else ""
    storage = args.storage or VOLUME_FOLDER
    if not os.path.isabs(storage) or os.path.normpath(storage) == "/":
        fail("--storage", storage, "must be an absolute folder, and not / itself")
    if any(character in storage for character in " ,:"):
        fail("--storage", storage, "must have no space, comma or colon: schedulers cut it there")
    return os.path.normpath(storage)


def mounts_of(args: argparse.Namespace) -> "list[str]":
    """What a Slurm job's containers mount: `--mount`, and the storage where none of them has it."""
    mounts = list(args.mount)
    storage = storage_of(args)
    _, read = mounted_folders(args.mount)
    if not any(_contains(folder, storage) for folder in read):
        mounts.append(f"{storage}:{storage}")
    return mounts


def mounted_folders(mounts: Sequence[str]) -> "tuple[list[str], list[str]]":
    """Of `FROM[:TO[:FLAGS]]`, the folders that a container can write, and those that it can read.

    Raises:
        ValueError: one of them has no absolute folder to mount at.
    """
    written, read = [], []
    for mount in mounts:
        source, *rest = mount.split(":")
        folder = rest[0] if rest else source
        if not source or not os.path.isabs(folder):
            fail("--mount", mount, "must be FROM or FROM:TO, absolute folders")
        if any(character in mount for character in " ,"):
            fail("--mount", mount, "must have no space and no comma: nemo-run does not quote it")
        read.append(folder)
        flags = rest[1].split("+") if len(rest) > 1 else []
        if "ro" not in flags:
            written.append(folder)
    return written, read


def _contains(folder: str, path: str) -> bool:
    return os.path.commonpath([os.path.normpath(folder), path]) == os.path.normpath(folder)


def environment_of(args: argparse.Namespace) -> "dict[str, str]":
    """`--env`, by name; what is fetched from the hub is kept on the storage, too."""
    storage = storage_of(args)
    environment = {"HF_HOME": f"{storage}/huggingface"} if storage else {}
    for pair in args.env:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env {name}: must be NAME=VALUE")
        environment[name] = value
    return environment


def jobs_of(args: argparse.Namespace) -> "list[Job]":
    """The runs that a name stands for, resolved and checked.

    Raises:
        ValueError: an unknown name, an option or setting that is not valid, a layout that the model
            or the number of processes does not allow, or results that would end with the job.
    """
    for option, value, least in (
        ("--nodes", args.nodes, 1),
        ("--nproc", args.nproc, 1),
        ("--retries", args.retries, 0),
    ):
        if value is not None and value < least:
            fail(option, value, f"must be at least {least}")
    experiment = EXPERIMENTS.get(args.target, Experiment(recipes=[args.target]))
    unknown = [name for name in experiment.recipes if name not in RECIPES]
    if unknown:
        names = ", ".join([*EXPERIMENTS, *RECIPES])
        raise ValueError(f"{args.target}: no such recipe or experiment; there are {names}")
    named = any(override.split("=")[0] == "name" for override in args.overrides)
    if len(experiment.recipes) > 1 and named:
        raise ValueError(f"name: the runs of {args.target} have their own; set runs_dir instead")
    run_dirs: dict[str, str] = {}  # as the recipe has it -> as it is launched
    jobs = []
    for name in experiment.recipes:
        job = _job(name, args, run_dirs)
        run_dirs[RECIPES[name]().run_dir] = job.config.run_dir
        jobs.append(job)
    return jobs


def _job(name: str, args: argparse.Namespace, run_dirs: "Mapping[str, str]") -> Job:
    storage = storage_of(args)
    meant = hardware_of(name)
    hardware = Hardware(
        nodes=args.nodes or meant.nodes,
        gpus_per_node=args.nproc or meant.gpus_per_node,
        gpu=meant.gpu,
    )
    asked = apply_overrides(RECIPES[name](), args.overrides)
    settings = _model_of_another_run(asked, run_dirs)
    config = apply_overrides(asked, _texts(settings))
    if storage:
        if args.executor != "local" and _needs_data_dir(config, args.overrides):
            settings["data.data_dir"] = f"{storage}/data"
        settings |= on_storage(config, storage)
        config = apply_overrides(config, _texts(settings))
    _check_storage(config, args)
    _check_layout(config, asked, hardware, args)
    kept = [word for word in args.overrides if word.partition("=")[0].strip() not in settings]
    return Job(recipe=name, overrides=[*kept, *_texts(settings)], config=config, hardware=hardware)


def _texts(settings: "Mapping[str, str]") -> "list[str]":
    return [f"{setting}={value}" for setting, value in settings.items()]


def _model_of_another_run(config: Config, run_dirs: "Mapping[str, str]") -> "dict[str, str]":
    """`model.path` where it is what another run of the experiment leaves, and that run moved."""
    for before, now in run_dirs.items():
        if config.model.path.startswith(f"{before}/") and now != before:
            return {"model.path": now + config.model.path.removeprefix(before)}
    return {}


def _needs_data_dir(config: Config, overrides: Sequence[str]) -> bool:
    """Whether data sets are looked for, and the user did not say where, not even `data_dir=`."""
    if not isinstance(config, RunConfig) or config.data.data_dir:
        return False
    if any(word.partition("=")[0].strip() == "data.data_dir" for word in overrides):
        return False
    datasets = [config.data.dataset, *config.evaluation.datasets]
    return any(dataset not in GENERATED for dataset in datasets)


def _check_storage(config: Config, args: argparse.Namespace) -> None:
    """Refuse a run whose results would end with the job, or that would not find its files."""
    if args.executor == "local":
        _check_writable(config.run_dir)
        return
    if args.executor == "slurm":
        written, read = mounted_folders(mounts_of(args))
    else:
        written = read = [storage_of(args)]
    check_on_storage(config, written=written, read=read)


def _check_writable(run_dir: str) -> None:
    """On this machine nothing need be mounted, but the folder must be one that can be made."""
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        fail("runs_dir", os.path.dirname(run_dir), f"{folder} is no folder that can be written to")


def _check_layout(
    config: Config, asked: Config, hardware: Hardware, args: argparse.Namespace
) -> None:
    """Refuse a layout that the model or the number of processes does not allow.

    A model that only the job's storage has is looked at when the job starts.
    """
    sizes = MODELS.get(asked.model.path)
    if sizes is None:
        path = config.model.path
        elsewhere = args.executor != "local" and is_path(path)
        if elsewhere and not Path(path).is_dir():
            print(f"{config.name}: {path} is not on this machine: its layout is checked there")
            return
        sizes = read_hf_config(config.model)
    check_layout(config, sizes, hardware.num_processes, hardware.gpus_per_node)
