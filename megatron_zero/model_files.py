"""The model's files of a run: what is made of `model.path`, `model.architecture` and the tokenizer.

They are in the run's folder `model`: the engine starts from them, and every export carries them.
"""

import json
from pathlib import Path
from typing import Any

from megatron_zero.config import ModelConfig
from megatron_zero.convert.families import family_for
from megatron_zero.convert.hf_dir import copy_carried_files
from megatron_zero.data.stop_tokens import declare_stop_tokens
from megatron_zero.hf_config import DTYPES, read_hf_config, with_vocab_size


def complete_hf_config(model: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """The model's config with what only the tokenizer knows filled in."""
    num_tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    hf_config = with_vocab_size(read_hf_config(model), num_tokens, model)
    if not model.path or (model.init == "random" and model.tokenizer):
        hf_config |= {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
    family = family_for(hf_config)
    return {**family.defaults, **hf_config, "dtype": DTYPES[model.dtype]}


def write_model_files(
    directory: Path,
    model: ModelConfig,
    hf_config: dict[str, Any],
    tokenizer: Any,
    source: Path | None,
    stop_ids: tuple[int, ...],
) -> None:
    """Config and tokenizer without weights: what the engine starts from and an export carries.

    Args:
        source: the folder of `model.path`; None without one.
        stop_ids: from `stop_token_ids`; the folder names these and no others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if source is not None:
        copy_carried_files(source, directory, with_tokenizer=not model.tokenizer)
    if source is None or model.tokenizer:
        tokenizer.save_pretrained(directory)
    config_path = directory / "config.json"
    config_path.write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    declare_stop_tokens(directory, stop_ids)
