"""Run by test_nemo_run.py in an environment of nemo-run 0.11 without torch: use recipes.launch."""

import importlib.util
import os
import sys
from pathlib import Path

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


def main() -> None:
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(KUBECONFIG))
    os.environ["KUBECONFIG"] = str(kubeconfig)
    import nemo_run

    from recipes import launch
    from recipes.hardware import hardware_of

    assert nemo_run.__version__.startswith("0.11"), nemo_run.__version__
    assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("vllm") is None
    common = ["--image", "registry/megatron_zero:1", "--output", str(directory), "--dryrun"]
    slurm = ["ablation", "--executor", "slurm", "--account", "lab", *common]
    assert launch.main(slurm) == 0
    scripts = list(directory.glob("experiments/ablation/*/*_sbatch.sh"))
    assert len(scripts) == 4, scripts
    assert all("-m megatron_zero.train ablation_" in s.read_text() for s in scripts)

    assert launch.has_executor("k8s")
    assert launch.main(["qwen3_30b_a3b", "--executor", "k8s", "--volume", "lab", *common]) == 0
    args = launch.make_parser().parse_args(["qwen3_30b_a3b", "--executor", "k8s", *common])
    executor = launch.executor_of(args, hardware_of("qwen3_30b_a3b"))
    body = executor.get_job_body("qwen3-30b-a3b", ["torchrun", "-m", "megatron_zero.train"])
    trainer = body["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    for override in body["spec"]["podTemplateOverrides"]:
        check_kubernetes({"containers": [], **override["spec"]}, "V1PodSpec")

    # launchers/' own manifest, against the client's classes
    (config,) = launch.configs_of("qwen3_30b_a3b", []).values()
    manifest = launch.manifest_of("qwen3_30b_a3b", config, args, hardware_of("qwen3_30b_a3b"))
    template = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    check_kubernetes(template, "V1PodTemplateSpec")
    try:
        check_kubernetes({"spec": {"containerz": []}}, "V1PodTemplateSpec")
    except AssertionError:
        print("RESULT ok")


if __name__ == "__main__":
    main()
