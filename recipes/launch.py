"""Recipes through nemo-run: on this machine, Slurm, Kubernetes or a cloud.

python -m recipes.launch quickstart --executor local --nproc 2 num_steps=3
python -m recipes.launch qwen3_30b_a3b --executor slurm --account lab --image IMAGE --dryrun
python -m recipes.launch ablation --executor k8s --image registry/megatron_zero:1 --volume data

A name is a recipe or, of several runs, an experiment of `recipes.studies`. Settings are checked
here as `megatron-zero` does, before anything is submitted; what is submitted is `torchrun -m
megatron_zero.train <recipe> <settings>`, so the machines that run it need the same version of the
project and this one needs no torch. Works with nemo-run 0.4, which can live beside vLLM, and with
0.11, which cannot (extra `launch-only`). Where nemo-run has no executor (0.4: Kubernetes; SkyPilot
without its package), the manifest of `launchers/` is filled in, and given to kubectl or sky.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
import yaml
from nemo_run.config import get_nemorun_home

from megatron_zero.config import PretrainConfig, RunConfig
from megatron_zero.config_io import Config, apply_overrides, kind_of
from megatron_zero.hf_config import read_hf_config
from megatron_zero.launch_args import user_errors
from megatron_zero.layout import check_layout
from recipes import EXPERIMENTS, RECIPES
from recipes.hardware import MODELS, Hardware, hardware_of
from recipes.studies import Experiment

EXECUTORS = ("local", "slurm", "skypilot", "k8s")
LAUNCHERS = Path(__file__).parents[1] / "launchers"


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
    parser.add_argument("--retries", type=int, default=3, help="restarts by the scheduler")
    parser.add_argument("--image", default="", help="container (Slurm, k8s: needed)")
    parser.add_argument("--time", default="24:00:00", help="Slurm: limit")
    parser.add_argument("--account", default="", help="Slurm (needed)")
    parser.add_argument("--partition", default="", help="Slurm")
    parser.add_argument("--mount", action="append", default=[], help="Slurm containers: FROM:TO")
    parser.add_argument("--namespace", default="default", help="k8s")
    parser.add_argument("--volume", default="megatron-zero", help="k8s: shared volume claim")
    return parser


def configs_of(target: str, overrides: Sequence[str]) -> "dict[str, Config]":
    """The runs that a name stands for, by recipe, with the overrides in each.

    Raises:
        ValueError: an unknown name, or a setting that is not valid.
    """
    experiment = EXPERIMENTS.get(target, Experiment(recipes=[target]))
    unknown = [name for name in experiment.recipes if name not in RECIPES]
    if unknown:
        names = ", ".join([*EXPERIMENTS, *RECIPES])
        raise ValueError(f"{target}: no such recipe or experiment; there are {names}")
    if len(experiment.recipes) > 1 and any(o.split("=")[0] == "name" for o in overrides):
        raise ValueError(f"name: the runs of {target} have their own; set runs_dir instead")
    return {name: apply_overrides(RECIPES[name](), overrides) for name in experiment.recipes}


def check(name: str, config: Config, hardware: Hardware) -> None:
    """Refuse a layout that the model or the number of processes does not allow."""
    sizes = MODELS.get(config.model.path) or read_hf_config(config.model)
    check_layout(config, sizes, hardware.num_processes, hardware.gpus_per_node)


def words_of(name: str, args: argparse.Namespace) -> "list[str]":
    """The arguments of every process. What a scheduler starts again has to go on, not to begin."""
    starts_again = args.executor != "local" and args.retries > 0
    return [name, *args.overrides, *(["--resume"] if args.resume or starts_again else [])]


def environment_of(args: argparse.Namespace) -> "dict[str, str]":
    """`--env`, by name."""
    pairs = [pair.partition("=") for pair in args.env]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise ValueError(f"--env {name}: must be NAME=VALUE")
    return {name: value for name, _, value in pairs}


def executor_of(args: argparse.Namespace, hardware: Hardware) -> run.Executor:
    """nemo-run's executor for `--executor`."""
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
            container_mounts=list(args.mount),
            tunnel=run.LocalTunnel(job_dir=str(Path(args.output).absolute())),
            packager=run.Packager(),
            **common,
        )
    if args.executor == "skypilot":
        return run.SkypilotExecutor(
            gpus=hardware.gpu,
            gpus_per_node=hardware.gpus_per_node,
            num_nodes=hardware.nodes,
            container_image=args.image or None,
            **common,
        )
    from nemo_run.core.execution.kubeflow import KubeflowExecutor

    claim = {"name": "shared", "persistentVolumeClaim": {"claimName": args.volume}}
    return KubeflowExecutor(
        namespace=args.namespace,
        image=args.image,
        num_nodes=hardware.nodes,
        gpus_per_node=hardware.gpus_per_node,
        volumes=[claim],
        volume_mounts=[{"name": "shared", "mountPath": "/shared"}],
        container_kwargs={"workingDir": "/shared"},
        **common,
    )


def has_executor(kind: str) -> bool:
    """Whether the installed nemo-run can reach this kind of scheduler itself."""
    if kind == "k8s":
        try:
            from nemo_run.core.execution import kubeflow
        except ImportError:
            return False
        return kubeflow._KUBERNETES_AVAILABLE
    if kind == "skypilot":
        from nemo_run.core.execution import skypilot

        return skypilot._SKYPILOT_AVAILABLE
    return True


def manifest_of(
    name: str, config: Config, args: argparse.Namespace, hardware: Hardware
) -> "dict[str, Any]":
    """The manifest of `launchers/` for `--executor`, filled in for one run."""
    words = words_of(name, args)
    environment = environment_of(args) | {"COMMAND": kind_of(config)}
    job = config.name.replace("_", "-").lower()
    if args.executor == "skypilot":
        task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
        task |= {"name": job, "num_nodes": hardware.nodes}
        task["resources"]["accelerators"] = f"{hardware.gpu}:{hardware.gpus_per_node}"
        if args.image:
            task["resources"]["image_id"] = f"docker:{args.image}"
        task["envs"] |= environment | {"RUN": shlex.join(words)}
        return task
    if not args.image:
        raise ValueError("--image: needed with --executor k8s")
    manifest = yaml.safe_load((LAUNCHERS / "kubernetes" / "pytorchjob.yaml").read_text())
    manifest["metadata"] = {"name": job, "namespace": args.namespace}
    manifest["spec"]["nprocPerNode"] = str(hardware.gpus_per_node)
    manifest["spec"]["runPolicy"]["backoffLimit"] = args.retries
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    worker["replicas"] = hardware.nodes
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": args.image, "args": words}
    container["resources"]["limits"]["nvidia.com/gpu"] = hardware.gpus_per_node
    own = environment | {"NNODES": str(hardware.nodes), "HEAD_NODE": f"{job}-worker-0"}
    own |= {"NPROC_PER_NODE": str(hardware.gpus_per_node), "JOB_ID": job}
    kept = [entry for entry in container["env"] if entry["name"] not in own]
    container["env"] = kept + [{"name": n, "value": v} for n, v in own.items()]
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = args.volume
    return manifest


def submit_manifests(
    configs: "dict[str, Config]", args: argparse.Namespace, hardware: "dict[str, Hardware]"
) -> None:
    """Write a manifest per run; without `--dryrun`, hand them to kubectl or sky."""
    for name, config in configs.items():
        path = Path(args.output) / f"{config.name}.{args.executor}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = manifest_of(name, config, args, hardware[name])
        path.write_text(yaml.safe_dump(manifest, sort_keys=False))
        print(path, flush=True)
        if not args.dryrun:
            job = config.name.replace("_", "-").lower()
            sky = ["sky", "jobs", "launch", "--yes", "--name", job, str(path)]
            kubectl = ["kubectl", "apply", "-f", str(path)]
            subprocess.run(kubectl if args.executor == "k8s" else sky, check=True)


def submit(
    configs: "dict[str, Config]", args: argparse.Namespace, hardware: "dict[str, Hardware]"
) -> int:
    """All runs as one `run.Experiment`; the number that failed (local only: others go on)."""
    sequential = args.target in EXPERIMENTS and EXPERIMENTS[args.target].sequential
    local, slurm = args.executor == "local", args.executor == "slurm"
    if local:  # nemo-run starts `torchrun` by its name
        bin_dir = str(Path(sys.executable).parent)
        os.environ["PATH"] = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    Path(get_nemorun_home()).mkdir(parents=True, exist_ok=True)  # 0.4 expects it to be there
    with run.Experiment(args.target, base_dir=str(Path(args.output).absolute())) as experiment:
        before: list[str] = []
        for name, config in configs.items():
            module = f"megatron_zero.{kind_of(config)}"
            words = words_of(name, args)
            task = run.Script(path=module, m=True, entrypoint="python", args=words)
            executor = executor_of(args, hardware[name])
            after = {"dependencies": before} if slurm and sequential and before else {}
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
        configs = configs_of(args.target, args.overrides)
        hardware = {}
        for name, config in configs.items():
            meant = hardware_of(name)
            hardware[name] = Hardware(
                nodes=args.nodes or meant.nodes,
                gpus_per_node=args.nproc or meant.gpus_per_node,
                gpu=meant.gpu,
                memory_gib=meant.memory_gib,
            )
            check(name, config, hardware[name])
        if not has_executor(args.executor):
            submit_manifests(configs, args, hardware)
            return 0
        executor_of(args, next(iter(hardware.values())))  # what it refuses, it refuses here
    return 1 if submit(configs, args, hardware) else 0


@run.cli.entrypoint(namespace="megatron_zero")
def train(config: RunConfig, resume: bool = False) -> None:
    """`nemo megatron_zero train config=quickstart config.num_steps=3`: one run."""
    from megatron_zero import train as program

    program.train(config, resume=resume)


@run.cli.entrypoint(namespace="megatron_zero")
def pretrain(config: PretrainConfig, resume: bool = False) -> None:
    """`nemo megatron_zero pretrain config=quickstart_base`: a next-token run."""
    from megatron_zero import pretrain as program

    program.pretrain(config, resume=resume)


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
