"""The model's files of a run: what is made of `model.path`, `model.architecture` and the tokenizer.

They are in the run's folder `model`: the engine starts from them, and every export carries them.
Whether the weights of `model.path` can be what they should be is looked at here too, from their
headers alone, before anything large is started; their values are looked at while they are read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_zero.config import ModelConfig, fail
from megatron_zero.convert.dist_checkpoint import is_checkpoint
from megatron_zero.convert.families import family_for, mapping_for
from megatron_zero.convert.fp8 import is_fp8_blocks
from megatron_zero.convert.hf_dir import copy_carried_files, open_source, read_config
from megatron_zero.convert.safetensors_io import INDEX_NAME, SINGLE_NAME, SafetensorsSource
from megatron_zero.convert.stored import NUM_MTP, Corrections, folder_corrections
from megatron_zero.convert.to_hf import MegatronTensors
from megatron_zero.data.stop_tokens import declare_stop_tokens
from megatron_zero.hf_config import DTYPES, other_weights, read_hf_config, with_vocab_size
from megatron_zero.types import Prompt

ENGINE_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # what vLLM looks for in a folder


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


def stored_corrections(
    hf_config: dict[str, Any], model: ModelConfig, source: Path | None
) -> Corrections:
    """Where the weights that a run starts from are not the model of their config.

    Args:
        source: the folder of `model.path`.

    Raises:
        ValueError: the folder's files are damaged.
    """
    if source is None or model.init != "pretrained":
        return Corrections()
    try:
        return folder_corrections(hf_config, source)
    except ValueError as error:
        fail("model.path", model.path, str(error))


def exported_config(
    hf_config: dict[str, Any], model: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """The config of what a run exports and its engine holds, and a sentence about each difference.

    Prediction layers are ignored by the policy, and 8-bit blocks dequantized when they are read.
    """
    exported, notes = dict(hf_config), []
    if exported.get(NUM_MTP):
        what = f"{NUM_MTP}={exported[NUM_MTP]}"
        notes.append(f"{model.path}: {what}: these layers are not trained, nor exported")
        exported[NUM_MTP] = 0
    if is_fp8_blocks(exported.get("quantization_config")):
        del exported["quantization_config"]
        notes.append(f"{model.path}: 8-bit blocks are trained, and exported, as {model.dtype}")
    return exported, notes


def check_weights(model: ModelConfig, hf_config: dict[str, Any], source: Path) -> None:
    """Compare the weights of a folder with the model's table: files, names, shapes.

    No tensor is read.

    Args:
        source: the folder of `model.path`, of an HF or a converted Megatron checkpoint.

    Raises:
        ValueError: what is missing, damaged or of another shape, by tensor and file.
    """
    if model.init != "pretrained":
        return
    try:
        if is_checkpoint(source):
            MegatronTensors(source, hf_config, "keep")
        else:
            stored = open_source(source, read_config(source), model.dtype)
            mapping_for(hf_config, with_mtp=False).check_source(stored)
    except ValueError as error:
        fail("model.path", model.path, str(error))


def check_weights_for_engine(model: ModelConfig, hf_config: dict[str, Any], source: Path) -> None:
    """`check_weights` of a model that only the engine loads, which knows more kinds of them.

    Of a model that no table describes only the files are looked at; pickled weights are the
    engine's own affair.

    Raises:
        ValueError: as `check_weights`.
    """
    if is_checkpoint(source):
        cure = "tools/convert/megatron_to_hf.py makes one that it does"
        fail("model.path", model.path, f"a Megatron checkpoint, which vLLM does not read: {cure}")
    if not any((source / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        if not any(path for pattern in ENGINE_WEIGHTS for path in source.glob(pattern)):
            fail("model.path", model.path, f"no weights are there{other_weights(source)}")
        return
    quantization = hf_config.get("quantization_config")
    try:
        mapping_for(hf_config)
        is_known = not quantization or is_fp8_blocks(quantization)
    except ValueError:
        is_known = False
    if is_known:
        check_weights(model, hf_config, source)
        return
    try:
        SafetensorsSource(source).files()
    except ValueError as error:
        fail("model.path", model.path, str(error))


def check_token_ids(model: ModelConfig, vocab_size: int, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts with a token that the model has no embedding of.

    For who evaluates: a tokenizer may have more tokens than the model when none of them is used.

    Raises:
        ValueError: with the token and the sizes, and the setting that names the tokenizer.
    """
    largest = max((max(prompt.token_ids) for prompt in prompts), default=0)
    if largest < vocab_size:
        return
    setting, value = "model.path", model.path
    if model.tokenizer:
        setting, value = "model.tokenizer", model.tokenizer
    sizes = f"where the model has vocab_size={vocab_size}"
    fail(setting, value, f"the tokenizer makes token {largest} of a prompt, {sizes}")


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
