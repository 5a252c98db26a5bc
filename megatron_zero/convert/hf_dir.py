"""An HF directory or hub id as a conversion takes it: config, files to carry over, chosen dtype."""

import json
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_zero.checks import UserError, fail
from megatron_zero.convert.fp8 import DequantizedSource, is_fp8_blocks
from megatron_zero.convert.safetensors_io import INDEX_NAME, SafetensorsSource
from megatron_zero.convert.sources import TensorSource
from megatron_zero.hf_config import local_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HF_FILES = "hf_files.json"  # in a Megatron directory: the original's files and their tensors

MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
_NOT_CARRIED = ("config.json", INDEX_NAME, HF_FILES, "metadata.json")


def local_directory(
    path: "str | Path", option: str, group: Optional[dist.ProcessGroup] = None
) -> Path:
    """`path` if it is a folder, else the hub's files of that id: see `hf_config.local_folder`.

    Args:
        group: all ranks of a job, where all of them ask: the first downloads before the others.
    """
    if group is not None and group.rank() > 0:
        dist.barrier(group=group)
    found = local_folder(option, str(path), ["*.safetensors", *MODEL_FILES])
    if group is not None and group.rank() == 0:
        dist.barrier(group=group)
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a directory. Raises `ValueError` if it is missing or no object."""
    path = directory / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check_dtype(choice: str) -> None:
    if choice not in (*DTYPES, "keep"):
        fail("dtype", choice, "must be bf16, fp32 or keep")


def chosen_dtype(stored: torch.dtype, choice: str, stays_float32: bool) -> torch.dtype:
    """The type to write: `choice`, but what must stay float32 is not narrowed."""
    return stored if choice == "keep" or (stays_float32 and choice == "bf16") else DTYPES[choice]


def open_source(directory: Path, config: dict[str, Any], dtype: str) -> TensorSource:
    """The tensors of a directory, mapped; those in 8-bit blocks become `dtype`, bf16 for keep."""
    quantization = config.get("quantization_config")
    if not is_fp8_blocks(quantization):
        return SafetensorsSource(directory, mapped=True)
    stored = SafetensorsSource(directory, fp8=True, mapped=True)
    return DequantizedSource(stored, quantization, DTYPES.get(dtype, torch.bfloat16))


def carried_files(source: Path) -> list[Path]:
    """What belongs to a model besides weights and config: tokenizer, generation settings."""
    files = [path for pattern in MODEL_FILES for path in source.glob(pattern)]
    return sorted(path for path in files if path.name not in _NOT_CARRIED)


def carry_over(source: Path, directory: Path, dtype: str, *, with_mtp: bool) -> None:
    """Copy config, tokenizer and generation settings; the config tells what has changed."""
    for path in carried_files(source):
        shutil.copyfile(path, directory / path.name)
    text = (source / "config.json").read_text(encoding="utf-8")
    original = json.loads(text)
    config = {k: v for k, v in original.items() if not is_fp8_blocks(v)}
    if dtype != "keep":
        fields = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(fields, str(DTYPES[dtype]).removeprefix("torch."))
    if not with_mtp and config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    if config != original:
        text = json.dumps(config, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def fingerprint(directory: Path) -> list[object]:
    """Path, and size and time of every file in it: whether a source is still the same."""
    stats = {path.name: path.stat() for path in sorted(directory.iterdir()) if path.is_file()}
    return [str(directory.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats.items())]
