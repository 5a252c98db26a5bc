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
from megatron_zero.hf_config import check_model_type, local_folder, read_hf_config

# Files of the tokenizers that transformers reads; a folder with none of them has none.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
_FAST_TOKENIZER = "tokenizer.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONVERTED = (".metadata", "metadata.json")  # of a Megatron checkpoint


def check_files(config: Config) -> None:
    """Look at all that a training run names: model, tokenizer, data.

    Raises:
        ValueError: what is missing or is not supported, with its setting.
    """
    model = config.model
    check_model_type(read_hf_config(model), model.path)
    folder = _local(model.path)
    if folder is not None and model.init == "pretrained":
        _check_weights(folder, model.path)
    check_tokenizer(model)
    check_data_files(config)


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
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fail(setting, value, f"{path} cannot be read: {error}")


def _local(path: str) -> Optional[Path]:
    """The folder that a setting names; None for a hub id, or no setting."""
    folder = Path(path).expanduser()
    return folder if path and folder.is_dir() else None


def _check_weights(folder: Path, path: str) -> None:
    """Whether the files are there that the weights must be in."""
    if all((folder / name).is_file() for name in _CONVERTED) or (folder / _WEIGHTS).is_file():
        return
    index = folder / _INDEX
    if not index.is_file():
        valid = f"holds no weights: neither {_WEIGHTS}, nor {_INDEX}, nor a converted checkpoint"
        fail("model.path", path, valid)
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail("model.path", path, f"{index} is not an index of safetensors files: {error!r}")
    missing = sorted(name for name in files if not (folder / str(name)).is_file())
    if missing:
        fail("model.path", path, f"lacks {', '.join(missing[:5])}, which {_INDEX} names")
