"""Whether a conversion is right: every tensor by its digest, and the model by its logits."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import xxhash

from megatron_zero.convert.hf_dir import open_source, read_config
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.sources import raw_bytes


class VerificationError(RuntimeError):
    """What was written is not what was read."""


def verify_conversion(mapping: Mapping, megatron: Path, hf: Path, dtype: str) -> list[str]:
    """Compare both sides of a conversion as they lie on the disk.

    Args:
        mapping: of the model.
        megatron: the Megatron directory.
        hf: the HF directory.
        dtype: what the conversion was asked for; both sides are rounded to it.

    Returns:
        What was found, in sentences.

    Raises:
        VerificationError: naming the first tensor that differs, or how far the logits do.
    """
    from megatron_zero.convert.to_hf import MegatronTensors  # which imports this module

    tensors = MegatronTensors(megatron, mapping.config, dtype)
    source = open_source(hf, read_config(hf), dtype)
    for name in mapping.hf_names():
        theirs = [source.read(name).to(tensors.dtype(name))]
        if _digest(tensors.read(name)) != _digest(theirs):
            raise VerificationError(f"tensor {name} differs between {hf} and {megatron}")
    problem = _logits_problem(mapping)
    logits = f"logits not compared: {problem}" if problem else _compare_logits(hf, megatron, dtype)
    return [f"verified: {len(mapping.hf_names())} tensors are the same on both sides", logits]


def _digest(pieces: list[torch.Tensor]) -> bytes:
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(raw_bytes(piece))
    return digest.digest()


def _logits_problem(mapping: Mapping) -> str:
    """Why the logits cannot be compared here; empty if they can."""
    if mapping.config.get("quantization_config"):
        return "the original is quantized"
    for package in ("megatron", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    needed = 2 * 4 * sum(math.prod(mapping.hf_shape(name)) for name in mapping.hf_names())
    free = psutil.virtual_memory().available
    if needed > free:
        return f"two float32 models need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    return ""


def _compare_logits(hf: Path, megatron: Path, dtype: str) -> str:
    """Run the model in both forms, in a process of its own; what it says last."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "megatron_zero.policy.check_logits", str(hf), str(megatron)]
    result = subprocess.run(
        [*command, "--dtype", dtype],
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    lines = (result.stdout.strip() or result.stderr.strip() or "no output").splitlines()
    if result.returncode:
        raise VerificationError(f"comparing logits failed: {lines[-1]}")
    return lines[-1]
