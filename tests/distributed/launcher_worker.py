"""Run by test_nemo_run.py in an environment of nemo-run 0.11 without torch: use recipes.launch."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import yaml

directory = Path(sys.argv[1])
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}],
    "users": [{"name": "u", "user": {"token": "none"}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
}


def check_kubernetes(body: "dict", type_name: str, path: str = "") -> None:
    """Every key must be a field of the official client's class; so recursively."""
    from kubernetes.client import models

    cls = getattr(models, type_name)
    fields = {cls.attribute_map[name]: kind for name, kind in cls.openapi_types.items()}
    for key, value in body.items():
        assert key in fields, f"{path}.{key} is no field of {type_name}"
        kind = fields[key]
        inner = kind.removeprefix("list[").removesuffix("]")
        if hasattr(models, inner):
            for item in value if kind != inner else [value]:
                check_kubernetes(item, inner, f"{path}.{key}")


def check_nemo_command(launch: "ModuleType") -> None:
    """Its words become the task that the program's own parser would make of them."""
    import fiddle

    from megatron_zero.config_io import resolve

    words = ["config=quickstart", "config.num_steps=3", "config.evaluation.datasets=aime,math"]
    task = launch.RecipeContext(name="train").parse_fn(launch.train, words)
    settings = ["num_steps=3", "evaluation.datasets=aime,math"]
    assert fiddle.build(task.config) == resolve("quickstart", settings, "train")


def main() -> None:
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(KUBECONFIG))
    os.environ["KUBECONFIG"] = str(kubeconfig)
    import nemo_run

    from megatron_zero.launch_args import parse_args
    from recipes import launch

    assert nemo_run.__version__.startswith("0.11"), nemo_run.__version__
    assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("vllm") is None
    common = ["--image", "registry/megatron_zero:1", "--output", str(directory), "--dryrun"]
    slurm = ["ablation", "--executor", "slurm", "--account", "lab", "--storage", "/lab", *common]
    assert launch.main(slurm) == 0
    scripts = list(directory.glob("experiments/ablation/*/*_sbatch.sh"))
    assert len(scripts) == 4, scripts
    assert all("-m megatron_zero.train ablation_" in s.read_text() for s in scripts)
    assert all("/lab:/lab" in s.read_text() for s in scripts)
    assert all("runs_dir=/lab/runs" in s.read_text() for s in scripts)

    assert launch.has_executor("k8s")
    pods = ["qwen3_30b_a3b", "--executor", "k8s", "--volume", "lab", *common]
    assert launch.main(pods) == 0
    args = launch.make_parser().parse_args([*pods, "--storage", "/mnt/lab"])
    (job,) = launch.jobs_of(args)
    executor = launch.executor_of(args, job.hardware)
    words = job.words(args)
    body = executor.get_job_body("qwen3-30b-a3b", ["torchrun", "-m", "megatron_zero.train", *words])
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    for override in body["spec"]["podTemplateOverrides"]:
        check_kubernetes({"containers": [], **override["spec"]}, "V1PodSpec")
    mounts = {
        mount["mountPath"]
        for override in body["spec"]["podTemplateOverrides"]
        for container in override["spec"].get("containers", [])
        for mount in container.get("volumeMounts", [])
    }
    assert "/mnt/lab" in mounts, mounts
    assert parse_args("train", words).config.run_dir == "/mnt/lab/runs/qwen3_30b_a3b"

    # launchers/' own manifest, against the client's classes
    manifest = launch.manifest_of(job, args)
    template = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    check_kubernetes(template, "V1PodTemplateSpec")
    check_nemo_command(launch)
    try:
        check_kubernetes({"spec": {"containerz": []}}, "V1PodTemplateSpec")
    except AssertionError:
        print("RESULT ok")


if __name__ == "__main__":
    main()
