"""Runs as manifests for Kubernetes (Kubeflow's PyTorchJob) and SkyPilot: those of `launchers/`.

The files there are valid as they stand; here they are filled in for one run and handed to `kubectl`
or `sky`. SkyPilot is always reached this way: nemo-run's own executor for it (0.4) copies files to
the machines and cannot mount storage that outlives them.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_zero.checks import fail
from megatron_zero.config_io import kind_of
from recipes import EXPERIMENTS
from recipes.hardware import GPUS
from recipes.jobs import Job, environment_of, storage_of

LAUNCHERS = Path(__file__).parents[1] / "launchers"
PROGRAMS = {"k8s": "kubectl", "skypilot": "sky"}


def manifest_of(job: Job, args: argparse.Namespace) -> "dict[str, Any]":
    """The manifest of `launchers/` for `--executor`, filled in for one run.

    Raises:
        ValueError: what the executor needs is missing or cannot work.
    """
    return _skypilot_task(job, args) if args.executor == "skypilot" else _pytorchjob(job, args)


def _skypilot_task(job: Job, args: argparse.Namespace) -> "dict[str, Any]":
    storage, hardware = storage_of(args), job.hardware
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    task |= {"name": job.name, "num_nodes": hardware.nodes}
    task["resources"] = {}
    gpu = GPUS[hardware.gpu].skypilot
    if gpu:
        task["resources"]["accelerators"] = f"{gpu}:{hardware.gpus_per_node}"
    else:
        task["resources"]["cpus"] = f"{hardware.gpus_per_node}+"
        task["setup"] = task["setup"].replace("[cuda]", "[cpu]")
    if args.image:
        task["resources"]["image_id"] = f"docker:{args.image}"
    del task["file_mounts"]
    if "://" in args.volume:
        if hardware.nodes > 1:
            valid = f"must be a volume of `sky volumes` for {hardware.nodes} nodes: each node has "
            fail("--volume", args.volume, f"{valid}its own copy of a bucket, which others see late")
        # The one mode in which files can be appended to, as metrics are.
        task["file_mounts"] = {storage: {"source": args.volume, "mode": "MOUNT_CACHED"}}
    else:
        task["volumes"] = {storage: args.volume}
    task["envs"] |= {"COMMAND": kind_of(job.config), "STORAGE": storage}
    task["envs"] |= {"NPROC_PER_NODE": str(hardware.gpus_per_node), "LOG_DIR": f"{storage}/logs"}
    task["envs"] |= environment_of(args) | {"RUN": shlex.join(job.words(args))}
    return task


def _pytorchjob(job: Job, args: argparse.Namespace) -> "dict[str, Any]":
    if not args.image:
        raise ValueError("--image: needed with --executor k8s")
    storage, hardware = storage_of(args), job.hardware
    manifest = yaml.safe_load((LAUNCHERS / "kubernetes" / "pytorchjob.yaml").read_text())
    manifest["metadata"] = {"name": job.name, "namespace": args.namespace}
    manifest["spec"]["nprocPerNode"] = str(hardware.gpus_per_node)
    manifest["spec"]["runPolicy"]["backoffLimit"] = args.retries
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    worker["replicas"] = hardware.nodes
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": args.image, "args": job.words(args)}
    resource = "nvidia.com/gpu" if hardware.memory_gib else "cpu"
    container["resources"]["limits"] = {resource: hardware.gpus_per_node}
    own = {
        "COMMAND": kind_of(job.config),
        "NNODES": str(hardware.nodes),
        "HEAD_NODE": f"{job.name}-worker-0",
        "NPROC_PER_NODE": str(hardware.gpus_per_node),
        "JOB_ID": job.name,
        "STORAGE": storage,
        "LOG_DIR": f"{storage}/logs",
        **environment_of(args),
    }
    kept = [entry for entry in container["env"] if entry["name"] not in own]
    container["env"] = kept + [{"name": name, "value": value} for name, value in own.items()]
    shared = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    for volume in pod["volumes"]:
        if volume["name"] in shared:
            volume["persistentVolumeClaim"]["claimName"] = args.volume
    for mount in container["volumeMounts"]:
        if mount["name"] in shared:
            mount["mountPath"] = storage
    return manifest


def check_program(args: argparse.Namespace) -> None:
    """Refuse to submit without the scheduler's own program, before anything is written."""
    program = PROGRAMS.get(args.executor)
    if args.executor == "slurm":
        program = "sbatch"
    if program and not args.dryrun and shutil.which(program) is None:
        advice = "--dryrun writes what would be submitted"
        fail("--executor", args.executor, f"needs {program}, which is not on PATH; {advice}")


def check_order(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Refuse to submit together what must run one after the other: manifests name no order."""
    experiment = EXPERIMENTS.get(args.target)
    if experiment is None or not experiment.sequential or args.dryrun:
        return
    names = ", then ".join(job.recipe for job in jobs)
    valid = "its runs need one another's results, and with manifests all would start at once"
    fail("name", args.target, f"{valid}: launch {names}")


def submit_manifests(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Write a manifest per run; without `--dryrun`, hand them to kubectl or sky.

    Returns:
        How many were refused there; what the program said is printed.
    """
    num_refused = 0
    manifests = [manifest_of(job, args) for job in jobs]  # all are sound before one is submitted
    for job, manifest in zip(jobs, manifests, strict=True):
        path = Path(args.output) / f"{job.config.name}.{args.executor}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(manifest, sort_keys=False))
        print(path, flush=True)
        if args.dryrun:
            continue
        command = ["kubectl", "apply", "-f", str(path)]
        if args.executor == "skypilot":
            command = ["sky", "jobs", "launch", "--yes", "--name", job.name, str(path)]
        status = subprocess.run(command, check=False).returncode
        if status:
            num_refused += 1
            text = f"error: {job.config.name}: `{shlex.join(command)}` ended with status {status}"
            print(text, file=sys.stderr)
    return num_refused
