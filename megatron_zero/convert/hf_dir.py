"""An HF directory or hub id as a conversion takes it: config, files to carry over, chosen dtype."""

import json
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_zero.checks import UserError, fail
from megatron_zero.convert.finite import FiniteSource
from megatron_zero.convert.fp8 import DequantizedSource, is_fp8_blocks
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.convert.sources import TensorSource
from megatron_zero.hf_config import local_folder, newest_export

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HF_FILES = "hf_files.json"  # in a Megatron directory: the original's files and their tensors
HF_DTYPES = "hf_dtypes.json"  # and the types of those that were widened

# What a model's folder may hold besides weights and goes wherever the model goes.
MODEL_FILES = (
    "*.json",  # tokenizer, its settings, special and added tokens, vocabulary, generation settings
    "*.txt",  # merges, vocabulary
    "*.model",  # sentencepiece
    "tokenizer.model.*",
    "*.tiktoken",
    "*.jinja",  # the chat template, and those beside it
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# The code of a model or tokenizer that its `auto_map` names: carried, never run.
_CODE_FILES = "*.py"
# config.json is written anew; the others describe weights that are not carried.
_NOT_CARRIED = ("config.json", HF_FILES, HF_DTYPES, "metadata.json", "adapter_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "tokenization*.py",
)


def local_directory(
    path: "str | Path", option: str, group: Optional[dist.ProcessGroup] = None
) -> Path:
    """`path` if it is a folder, else the hub's files of that id: see `hf_config.local_folder`.

    Args:
        group: all ranks of a job, where all of them ask: the first downloads before the others.
    """
    if group is not None and group.rank() > 0:
        dist.barrier(group=group)
    found = local_folder(option, str(path), ["*.safetensors", *MODEL_FILES, _CODE_FILES])
    if group is not None and group.rank() == 0:
        dist.barrier(group=group)
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a directory. Raises `ValueError` if it is missing or no object."""
    path = directory / "config.json"
    if not path.is_file():
        export = newest_export(directory)
        hint = f"; did you mean {export}?" if export else ""
        raise UserError(f"{directory} has no config.json{hint}")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of settings. Raises `ValueError` if it is missing or holds no object."""
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
    """The tensors of a directory, mapped; those in 8-bit blocks become `dtype`, bf16 for keep.

    Reading a tensor with a value that is NaN or infinite is a `ValueError` with its name and file.
    """
    quantization = config.get("quantization_config")
    if not is_fp8_blocks(quantization):
        return FiniteSource(SafetensorsSource(directory, mapped=True))
    stored = SafetensorsSource(directory, fp8=True, mapped=True)
    chosen = DTYPES.get(dtype, torch.bfloat16)
    return FiniteSource(DequantizedSource(stored, quantization, chosen))


def carried_files(source: Path, *, with_tokenizer: bool = True) -> list[Path]:
    """What belongs to a model besides weights and config: tokenizer, generation settings, code.

    Args:
        source: the model's folder.
        with_tokenizer: whether the tokenizer's files are among them, chat templates included.

    Returns:
        Paths relative to `source`, sorted.
    """
    patterns = list(MODEL_FILES)
    if _names_code(source):
        patterns.append(_CODE_FILES)
    found = {path.relative_to(source) for pattern in patterns for path in source.glob(pattern)}
    carried = []
    for path in sorted(found):
        is_index = path.name.endswith(".index.json")  # of weights
        is_tokenizers = any(path.match(pattern) for pattern in _TOKENIZER_FILES)
        if path.name in _NOT_CARRIED or is_index or (is_tokenizers and not with_tokenizer):
            continue
        if (source / path).is_file():
            carried.append(path)
    return carried


def copy_carried_files(source: Path, directory: Path, *, with_tokenizer: bool = True) -> None:
    """Copy `carried_files` into a folder that exists."""
    for path in carried_files(source, with_tokenizer=with_tokenizer):
        (directory / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, directory / path)


def _names_code(source: Path) -> bool:
    """Whether a model or tokenizer has classes of its own: `auto_map` in its settings."""
    for name in ("config.json", "tokenizer_config.json"):
        path = source / name
        if path.is_file() and read_json_object(path).get("auto_map"):
            return True
    return False


def carry_over(source: Path, directory: Path, dtype: str, changes: "dict[str, object]") -> None:
    """Copy config and `carried_files`; the config tells what has changed.

    Args:
        changes: config fields of which the copy is another model than the original says.
    """
    copy_carried_files(source, directory)
    text = (source / "config.json").read_text(encoding="utf-8")
    original = json.loads(text)
    config = {k: v for k, v in original.items() if not is_fp8_blocks(v)}
    if dtype != "keep":
        fields = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(fields, str(DTYPES[dtype]).removeprefix("torch."))
    config |= changes
    if config != original:
        text = json.dumps(config, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def fingerprint(directory: Path) -> list[object]:
    """Path, and size and time of every file in it: whether a source is still the same."""
    stats = {path.name: path.stat() for path in sorted(directory.iterdir()) if path.is_file()}
    return [str(directory.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats.items())]
