"""The model's `config.json` as a dictionary, read before anything heavy is started.

A launcher checks a layout against the number of layers and heads, and must not need torch or
transformers for that. Models come from a local folder, from the Hugging Face hub, or from
`model.architecture` when nothing is loaded at all.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from megatron_zero.checks import fail, round_up
from megatron_zero.config import ModelConfig
from megatron_zero.step_names import step_name, steps_in

VOCAB_MULTIPLE = 128  # a made-up vocabulary is padded to this: every usual TP size divides it
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

# Families that have a table in `convert.families`, by name here: the tables need torch.
MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "llama", "mistral", "mixtral")
MODEL_TYPES += ("qwen2", "qwen3", "qwen3_moe")

_REQUIRED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
_REQUIRED += ("num_attention_heads", "vocab_size")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


_PICKLED = "pickled weights are not read: load and save them with transformers"
_OTHER_WEIGHTS = {
    "*.safetensors": "must be called model.safetensors, or be listed in an index",
    "pytorch_model*.bin": _PICKLED,
    "*.pth": _PICKLED,
    "*.gguf": "quantized weights are not read: take the original model",
    "*.h5": "TensorFlow's weights are not read: load and save them with transformers",
    "*.msgpack": "Flax's weights are not read: load and save them with transformers",
}


def read_hf_config(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `model.path`, or one made from `model.architecture` when it is empty.

    A made one has `vocab_size` 0 unless the architecture sets it: `with_vocab_size` fills it in
    once the tokenizer is known.

    Raises:
        ValueError: no such folder or file, a hub id that cannot be had (offline and not in the
            cache, misspelt, gated), or a file that does not describe a language model.
    """
    if not model.path:
        return _made_config(model)
    path = local_folder("model.path", model.path, ["config.json"]) / "config.json"
    if not path.is_file():
        export = newest_export(path.parent)
        hint = f"; did you mean {export}?" if export else ""
        fail("model.path", model.path, f"{path.parent} has no config.json{hint}")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail("model.path", model.path, f"{path} cannot be read: {error}")
    missing = [key for key in _REQUIRED if not isinstance(hf_config, dict) or key not in hf_config]
    if missing:
        fail("model.path", model.path, f"{path} must have {', '.join(missing)}")
    return hf_config


def newest_export(folder: Path) -> Path | None:
    """The model of the last step in a run directory, or in its folder `hf`; None: there is none."""
    exports = folder / "hf" if (folder / "config.yaml").exists() else folder
    for step in reversed(steps_in(exports)):
        export = exports / step_name(step)
        if (export / "config.json").exists():
            return export
    return None


def check_model_type(hf_config: dict[str, Any], path: str) -> None:
    """Refuse a model of a family that no table describes.

    Raises:
        ValueError: with the families that there are.
    """
    model_type = hf_config["model_type"]
    if model_type not in MODEL_TYPES:
        fail("model.path", path, f"is a {model_type}; must be one of {', '.join(MODEL_TYPES)}")


def num_experts(hf_config: dict[str, Any]) -> int:
    """Routed experts of a layer, by any of the names that HF has for them; 0 in a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((hf_config[name] for name in names if hf_config.get(name)), 0)


def num_positions(hf_config: dict[str, Any]) -> "tuple[int, str]":
    """How long a sequence may be, and what says so.

    The engine refuses what is longer than `max_position_embeddings`, which the config of a model
    with YaRN must hold already stretched, and has no positions beyond `factor` times the original
    length.
    """
    length: int = hf_config["max_position_embeddings"]
    source = f"max_position_embeddings={length}"
    for name in ("rope_parameters", "rope_scaling"):
        block = hf_config.get(name)
        if not isinstance(block, dict) or "yarn" not in (block.get("rope_type"), block.get("type")):
            continue
        factor = block.get("factor")
        original = block.get("original_max_position_embeddings", length)
        if not isinstance(factor, (int, float)) or not isinstance(original, (int, float)):
            continue  # what is wrong with it, the family's table says
        stretched = int(factor * original)
        if stretched < length:
            return stretched, f"original_max_position_embeddings * factor={stretched} of YaRN"
        if stretched > length:
            source += f" (which config.json may raise to {stretched}, as YaRN allows)"
    return length, source


def with_vocab_size(
    hf_config: dict[str, Any], num_tokens: int, model: ModelConfig
) -> dict[str, Any]:
    """`hf_config` with a `vocab_size` that holds a tokenizer of `num_tokens` tokens.

    A size of 0 becomes `num_tokens` rounded up to a multiple of `VOCAB_MULTIPLE`; one that is set
    stays.

    Raises:
        ValueError: the size that is set is too small; names the setting that decides it, which is
            the architecture's only where no `model.path` is given.
    """
    vocab_size = hf_config["vocab_size"]
    if not vocab_size:
        return hf_config | {"vocab_size": round_up(num_tokens, VOCAB_MULTIPLE)}
    if vocab_size < num_tokens:
        if not model.path:
            valid = f"must be 0, or at least the {num_tokens} tokens of model.tokenizer"
            fail("model.architecture.vocab_size", vocab_size, f"{valid}={model.tokenizer!r}")
        sizes = f"{num_tokens} tokens, where its config.json has vocab_size={vocab_size}"
        if not model.tokenizer:
            fail("model.path", model.path, f"its tokenizer has {sizes}")
        sizes = f"{num_tokens} tokens, where model.path={model.path!r} has vocab_size={vocab_size}"
        fail("model.tokenizer", model.tokenizer, f"{sizes}; must have at most as many")
    return hf_config


def local_folder(option: str, path: str, patterns: "list[str]") -> Path:
    """`path` if it is a folder, else one with what the hub's model of that id has of `patterns`.

    Raises:
        ValueError: neither is there; names `option`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        fail(option, path, "no such folder")
    from huggingface_hub import snapshot_download  # not needed for local models

    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub's errors derive from
        reason = str(error).strip().splitlines()[0]
        fail(option, path, f"neither a folder nor a model that can be had from the hub: {reason}")


def other_weights(folder: Path) -> str:
    """What a folder without safetensors that can be read has in their place, and what to do then.

    Example:
        ", but model.gguf: quantized weights are not read: take the original model"
    """
    if (folder / "adapter_config.json").is_file():
        return ", but an adapter (LoRA): merge it into its base model first"
    for pattern, advice in _OTHER_WEIGHTS.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f", but {found[0]}: {advice}"
    return ""


def _made_config(model: ModelConfig) -> dict[str, Any]:
    """A Qwen2 with the sizes of `model.architecture`, as transformers 5 writes it."""
    settings = dataclasses.asdict(model.architecture)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": DTYPES[model.dtype],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.pop("rope_theta")},
        **settings,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    }
