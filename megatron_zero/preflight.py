"""The files that a run needs, looked at before any process is started; without torch.

Each check is the cheapest that finds the mistake: what is in the weights, or what a tokenizer
encodes, is found by the ranks.
"""

import json
from pathlib import Path
from typing import Optional

from megatron_zero.checks import fail
from megatron_zero.config import ModelConfig
from megatron_zero.config_io import Config
from megatron_zero.data.preflight import check_data_files
from megatron_zero.hf_config import check_model_type, local_folder, other_weights, read_hf_config

# Files of the tokenizers that transformers reads; a folder with none of them has none.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_FAST_TOKENIZER = "tokenizer.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_METADATA = "__metadata__"
_CONVERTED = (".metadata", "metadata.json")  # of a Megatron checkpoint


def check_files(config: Config) -> None:
    """Look at all that a training run names: model, tokenizer, data.

    Raises:
        ValueError: what is missing or is not supported, with its setting.
    """
    from megatron_zero.rewards.golds import check_readable  # sympy: not for `--help`

    model = config.model
    check_model_type(read_hf_config(model), model.path)
    folder = _local(model.path)
    if folder is not None and model.init == "pretrained":
        _check_weights(folder, model.path)
    check_tokenizer(model)
    check_data_files(config, check_golds=check_readable)


def check_tokenizer(model: ModelConfig) -> None:
    """Whether there is one, in `model.tokenizer` or with the model.

    Of a model on the hub it is not fetched here.

    Raises:
        ValueError: there is none, or its file is damaged.
    """
    if model.tokenizer == "characters":
        return
    if model.tokenizer:
        setting, value, advice = "model.tokenizer", model.tokenizer, ""
        folder: Optional[Path] = local_folder(setting, value, list(TOKENIZER_FILES))
    else:
        setting, value, advice = "model.path", model.path, "; name one with model.tokenizer"
        folder = _local(value)
    if folder is None:
        return
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        valid = f"no tokenizer is there, none of {', '.join(TOKENIZER_FILES)}{advice}"
        fail(setting, value, valid)
    path = folder / _FAST_TOKENIZER
    if path.is_file():
        _check_fast_tokenizer(path, setting, value)


def _check_fast_tokenizer(path: Path, setting: str, value: str) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(setting, value, f"{path} cannot be read: {error}")
    if not isinstance(content, dict) or not {"model", "added_tokens"} <= content.keys():
        fail(setting, value, f"{path} is no tokenizer: it must have model and added_tokens")


def _local(path: str) -> Optional[Path]:
    """The folder that a setting names; None for a hub id, or no setting."""
    folder = Path(path).expanduser()
    return folder if path and folder.is_dir() else None


def _check_weights(folder: Path, path: str) -> None:
    """Whether the files are there that the weights must be in, and as long as they say."""
    if all((folder / name).is_file() for name in _CONVERTED):
        return
    files, index = {_WEIGHTS}, folder / _INDEX
    if not (folder / _WEIGHTS).is_file():
        if not index.is_file():
            valid = f"holds no weights: no {_WEIGHTS}, no {_INDEX}, no converted checkpoint"
            fail("model.path", path, f"{valid}{other_weights(folder)}")
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail("model.path", path, f"{index} is not an index of safetensors files: {error!r}")
    missing = sorted(name for name in files if not (folder / str(name)).is_file())
    if missing:
        fail("model.path", path, f"lacks {', '.join(missing[:5])}, which {_INDEX} names")
    for name in sorted(files):
        _check_length(folder / name, path)


def _check_length(file: Path, path: str) -> None:
    """Compare a safetensors file with its header: 8 bytes of the header's length, it, the data."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8)) if 8 < start <= size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fail("model.path", path, f"{file} is damaged: its header cannot be read: {error!r}")
    if not ends or start + max(ends) != size:
        what = f"{size} bytes, and {start + max(ends)} by its header" if ends else "no tensors"
        fail("model.path", path, f"{file} is damaged or not complete: {what}")
