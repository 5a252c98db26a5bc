"""Recipes through nemo-run: on this machine, Slurm, Kubernetes or a cloud.

python -m recipes.launch quickstart --executor local --nproc 2 num_steps=3
python -m recipes.launch qwen3_30b_a3b --executor slurm --account lab --partition h100 \\
    --image registry/megatron_zero:1 --storage /lustre/lab --dryrun
python -m recipes.launch ablation --executor k8s --image registry/megatron_zero:1 --volume data
python -m recipes.launch qwen2_5_math_7b_80g --executor skypilot --volume s3://lab-runs

A name is a recipe or, of several runs, an experiment of `recipes.studies`. Settings are checked
here as `megatron-zero` does, before anything is submitted; what is submitted is `torchrun -m
megatron_zero.train <recipe> <settings>`, so the machines that run it need the same version of the
project and this one needs no torch. Results must outlive the job: `recipes.jobs` puts them on the
storage that the job mounts, and refuses what would be elsewhere. Works with nemo-run 0.4, which can
live beside vLLM, and with 0.11, which cannot (extra `launch-only`). Where nemo-run has no executor
(0.4: Kubernetes; SkyPilot), the manifest of `launchers/` is filled in (`recipes.manifests`).
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

try:
    import nemo_run as run
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {missing}: pip install '.[launch]', or launch-only without torch")
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import parse_cli_args
from nemo_run.config import get_nemorun_home

from megatron_zero.config import PretrainConfig, RunConfig
from megatron_zero.config_io import Config, kind_of, resolve
from megatron_zero.failures import reported, user_errors
from megatron_zero.launch_args import check_on_rank
from recipes import EXPERIMENTS, RECIPES
from recipes.hardware import Hardware
from recipes.jobs import Job, environment_of, jobs_of, mounts_of, storage_of
from recipes.manifests import check_order, check_program, manifest_of, submit_manifests

_STORAGE_HELP = (
    "folder of the storage that outlives the job, as the job sees it: runs_dir and other relative "
    "paths of a run are moved into it. Slurm: needed; k8s, skypilot: where the volume is mounted "
    "(/shared)"
)
EXECUTORS = ("local", "slurm", "skypilot", "k8s")


def make_parser() -> argparse.ArgumentParser:
    """The arguments; what only one executor understands says so."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.launch",
        usage="python -m recipes.launch <recipe|experiment> [key=value ...] [options]",
        description="Run a recipe, or the runs of an experiment, through nemo-run.",
        epilog=f"Experiments: {', '.join(EXPERIMENTS)}. Recipes: {', '.join(RECIPES)}.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="name", help="a recipe or an experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for megatron-zero")
    parser.add_argument("--executor", choices=EXECUTORS, default="local")
    parser.add_argument("--nodes", type=int, help="default: the recipe's")
    parser.add_argument("--nproc", type=int, help="processes of a node; default: the recipe's GPUs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--dryrun", action="store_true", help="write the scripts, submit nothing")
    parser.add_argument("--output", default="runs/launch", help="where scripts are written")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--storage", default="", metavar="DIR", help=_STORAGE_HELP)
    parser.add_argument("--volume", default="", help="k8s: claim; skypilot: bucket or volume")
    parser.add_argument("--retries", type=int, default=3, help="restarts by the scheduler")
    parser.add_argument("--image", default="", help="container (Slurm, k8s: needed)")
    parser.add_argument("--time", default="24:00:00", help="Slurm: limit")
    parser.add_argument("--account", default="", help="Slurm (needed)")
    parser.add_argument("--partition", default="", help="Slurm")
    parser.add_argument("--mount", action="append", default=[], help="Slurm: FROM:TO, also mounted")
    parser.add_argument("--namespace", default="default", help="k8s")
    return parser


def executor_of(args: argparse.Namespace, hardware: Hardware) -> run.Executor:
    """nemo-run's executor for `--executor`.

    Raises:
        ValueError: what the executor needs is missing or cannot work.
    """
    common = {"launcher": "torchrun", "env_vars": environment_of(args), "retries": args.retries}
    if args.executor == "local":
        if hardware.nodes > 1:
            raise ValueError(f"--nodes={hardware.nodes}: must be 1 with --executor local")
        return run.LocalExecutor(
            ntasks_per_node=hardware.gpus_per_node,
            packager=run.Packager(),
            **common | {"retries": 0},
        )
    if args.executor == "slurm":
        if not (args.account and args.image):
            why = "nemo-run's jobs run in containers; launchers/slurm.sbatch does without"
            raise ValueError(f"--account and --image: needed with --executor slurm: {why}")
        return run.SlurmExecutor(
            account=args.account,
            partition=args.partition or None,
            nodes=hardware.nodes,
            ntasks_per_node=hardware.gpus_per_node,
            gpus_per_node=hardware.gpus_per_node if hardware.memory_gib else None,
            time=args.time,
            exclusive=True,
            container_image=args.image or None,
            container_mounts=mounts_of(args),
            tunnel=run.LocalTunnel(job_dir=str(Path(args.output).absolute())),
            packager=run.Packager(),
            **common,
        )
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    if not args.image:
        raise ValueError("--image: needed with --executor k8s")
    storage = storage_of(args)
    claim = {"name": "shared", "persistentVolumeClaim": {"claimName": args.volume}}
    return KubeflowExecutor(
        namespace=args.namespace,
        image=args.image,
        num_nodes=hardware.nodes,
        gpus_per_node=hardware.gpus_per_node,
        volumes=[claim],
        volume_mounts=[{"name": "shared", "mountPath": storage}],
        container_kwargs={"workingDir": storage},
        **common,
    )


def has_executor(kind: str) -> bool:
    """Whether this scheduler is reached by the installed nemo-run, not by a manifest."""
    if kind == "k8s":
        try:
            from nemo_run.core.execution import kubeflow
        except ImportError:
            return False
        return kubeflow._KUBERNETES_AVAILABLE
    return kind != "skypilot"


def submit(jobs: "list[Job]", args: argparse.Namespace) -> int:
    """All runs as one `run.Experiment`; the number that failed (local only: others go on)."""
    sequential = args.target in EXPERIMENTS and EXPERIMENTS[args.target].sequential
    local, slurm = args.executor == "local", args.executor == "slurm"
    if local:  # nemo-run starts `torchrun` by its name
        bin_dir = str(Path(sys.executable).parent)
        os.environ["PATH"] = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    Path(get_nemorun_home()).mkdir(parents=True, exist_ok=True)  # 0.4 expects it to be there
    with run.Experiment(args.target, base_dir=str(Path(args.output).absolute())) as experiment:
        before: list[str] = []
        for job in jobs:
            module = f"megatron_zero.{kind_of(job.config)}"
            words = job.words(args)
            task = run.Script(path=module, m=True, entrypoint="python", args=words)
            executor = executor_of(args, job.hardware)
            after = {"dependencies": before} if slurm and sequential and before else {}
            name = job.recipe
            before = [experiment.add(task, executor=executor, name=name, tail_logs=local, **after)]
        if args.dryrun:
            experiment.dryrun(delete_exp_dir=False)
            return 0
        # on one machine runs would share the accelerators
        experiment.run(sequential=local or (sequential and not slurm), detach=not local)
    # nemo-run waits for what it does not detach from when the experiment is left
    return sum(job.state.name != "SUCCEEDED" for job in experiment.jobs) if local else 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit status."""
    args = make_parser().parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    with user_errors():
        storage_of(args)  # what the executor itself needs comes first
        by_manifest = not has_executor(args.executor)
        jobs = jobs_of(args)
        for job in jobs:  # what they refuse, they refuse before anything is submitted
            manifest_of(job, args) if by_manifest else executor_of(args, job.hardware)
        if by_manifest:
            check_order(jobs, args)
        if by_manifest or args.executor == "slurm":
            check_program(args)
    num_failed = submit_manifests(jobs, args) if by_manifest else submit(jobs, args)
    return 1 if num_failed else 0


class RecipeContext(RunContext):
    """nemo-run's command line with our settings after `config.`, read as `megatron-zero` does.

    nemo-run (0.4) drops `config=<recipe>` where `config.<setting>=` follows, and reads lists and
    text by Python's rules.
    """

    def parse_fn(
        self, fn: "Callable[..., None]", args: "list[str]", **default_kwargs: object
    ) -> run.Partial:
        """The task: `config=` a recipe or YAML file, `config.<setting>=` as overrides, and others.

        Raises:
            SystemExit: 2, after one line that says what is not valid.
        """
        targets, overrides, others = [], [], []
        for word in args:
            if word.startswith("config="):
                targets.append(word.removeprefix("config="))
            elif word.startswith("config."):
                overrides.append(word.removeprefix("config."))
            else:
                others.append(word)
        with user_errors():
            if self.factory or self.yaml:
                raise ValueError("--factory, --yaml: not read here; give config=<recipe or file>")
            if not targets:
                names = ", ".join(sorted(RECIPES))
                raise ValueError(f"config: give config=<recipe or YAML file>; recipes: {names}")
            known = [name for name in inspect.signature(fn).parameters if name != "config"]
            for word in others:
                if word.partition("=")[0] not in known:
                    also = ", ".join(f"{name}=" for name in known)
                    raise ValueError(f"{word}: settings are config.<setting>=<value>; also {also}")
            config = resolve(targets[-1], overrides, fn.__name__)
        task = parse_cli_args(fn, others, run.Partial)
        task.config = as_run_config(config)
        return task


@run.cli.entrypoint(namespace="megatron_zero", run_ctx_cls=RecipeContext)
def train(config: RunConfig, resume: bool = False) -> None:
    """`nemo megatron_zero train config=quickstart config.num_steps=3`: one run."""
    with checked(config, resume=resume):
        from megatron_zero import train as program

        program.train(config, resume=resume)


@run.cli.entrypoint(namespace="megatron_zero", run_ctx_cls=RecipeContext)
def pretrain(config: PretrainConfig, resume: bool = False) -> None:
    """`nemo megatron_zero pretrain config=quickstart_base`: a next-token run."""
    with checked(config, resume=resume):
        from megatron_zero import pretrain as program

        program.pretrain(config, resume=resume)


@contextmanager
def checked(config: Config, *, resume: bool) -> "Iterator[None]":
    """Around a run: what can be wrong with it is checked and reported as `megatron-zero` does."""
    with reported():
        with user_errors():
            check_on_rank(config, resume=resume)
        yield


def as_run_config(section: Any) -> Any:
    """A built configuration as nemo-run's own, whose parts its command line can set."""
    if not is_dataclass(section):
        return section
    names = [field.name for field in fields(section)]
    parts = {name: as_run_config(getattr(section, name)) for name in names}
    return run.Config(type(section), **parts)


def _register(name: str) -> None:
    """Make a recipe known to the `nemo` command, by its name."""
    config = RECIPES[name]()

    def factory() -> "run.Config[type(config)]":
        return as_run_config(config)

    run.cli.factory(factory, target=type(config), name=name)


for _name in RECIPES:
    _register(_name)

if __name__ == "__main__":
    sys.exit(main())
