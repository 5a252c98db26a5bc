"""Which tokens end a response: one answer, for the engine, evaluation and what is exported.

Three files may name them, and they need not agree. The rule:

1. The model's are those of its `generation_config.json`; where that is missing or names none, those
   of its `config.json` (as transformers and vLLM read them).
2. The tokenizer's EOS is always one: pretraining ends every document with it.
3. With another tokenizer than the model's own (`model.tokenizer`), an id of the model's counts if
   it is the same token in both. One that is another token ends nothing where the weights are
   random; where they are trained, tokenizer and model do not belong together, which is refused.

Example (Qwen2.5-Instruct): tokenizer <|im_end|> = 151645, generation_config.json [151645, 151643],
config.json 151645: responses end with <|im_end|> or <|endoftext|>, documents with <|im_end|>.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from megatron_zero.checks import UserError, fail
from megatron_zero.config import ModelConfig
from megatron_zero.convert.hf_dir import read_json_object

GENERATION_CONFIG = "generation_config.json"


def stop_token_ids(model: ModelConfig, tokenizer: Any, source: Optional[Path]) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's EOS first, then the model's own.

    Args:
        model: the section `model`.
        tokenizer: the run's.
        source: the folder of `model.path`; None without one.

    Raises:
        ValueError: a file that cannot be read, an `eos_token_id` that is none, or a tokenizer that
            has another token where trained weights end their responses.
    """
    ids: list[int] = []
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if source is None:
        return tuple(ids)
    origin, declared = _declared(source)
    own_tokens: dict[int, str] = {}
    if model.tokenizer and declared:
        own_tokens = _tokens_by_id(source)
    for token_id in declared:
        if model.tokenizer and not _same_token(model, token_id, tokenizer, own_tokens, origin):
            continue
        if token_id not in ids:
            ids.append(token_id)
    return tuple(ids)


def check_responses_can_end(
    stop_ids: Sequence[int], stop_strings: Sequence[str], model: ModelConfig
) -> None:
    """Refuse a model and template under which only the length would end a response."""
    if not stop_ids and not stop_strings:
        files = f"neither its {GENERATION_CONFIG} nor its config.json nor the tokenizer has an EOS"
        fail("model.path", model.path, f"nothing would end a response: {files}")


def describe_stop_tokens(stop_ids: Sequence[int], tokenizer: Any) -> str:
    """As it is said at the start of a run.

    Example:
        "<|im_end|> (151645), <|endoftext|> (151643)"
    """
    parts = []
    for token_id in stop_ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        parts.append(f"{token or 'not in the tokenizer'} ({token_id})")
    return ", ".join(parts) or "none"


def declare_stop_tokens(directory: Path, stop_ids: Sequence[int]) -> None:
    """Make a model's folder name exactly these, so that whoever loads it ends where the run did.

    A folder that says so already stays as it is; else `eos_token_id` in its
    `generation_config.json` is set, other settings there stay.
    """
    _, declared = _declared(directory)
    if set(declared) == set(stop_ids) or not stop_ids:
        return
    path = directory / GENERATION_CONFIG
    settings = _read_object(path)
    kept = [token_id for token_id in declared if token_id in stop_ids]
    added = [token_id for token_id in stop_ids if token_id not in kept]
    ids = kept + added
    settings["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _declared(directory: Path) -> tuple[str, list[int]]:
    """What a model's files name, and the file that names it. Ids that no model draws are left out.

    Raises:
        ValueError: naming the file.
    """
    config = read_json_object(directory / "config.json")
    generation = _read_object(directory / GENERATION_CONFIG)
    for name, settings in ((GENERATION_CONFIG, generation), ("config.json", config)):
        value = settings.get("eos_token_id")
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        for item in listed:
            if isinstance(item, bool) or not isinstance(item, int):
                path = directory / name
                raise UserError(f"{path}: eos_token_id={value!r}: must be one or more token ids")
        return name, [item for item in listed if 0 <= item < config["vocab_size"]]
    return "", []


def _read_object(path: Path) -> dict[str, Any]:
    """A file of settings; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def _same_token(
    model: ModelConfig, token_id: int, tokenizer: Any, own_tokens: Mapping[int, str], origin: str
) -> bool:
    """Whether an id that the model ends with is that token in the run's tokenizer too."""
    own = own_tokens.get(token_id)
    given = tokenizer.convert_ids_to_tokens(token_id)
    if own is None:  # the model's folder has no tokenizer: trained weights mean their own ids
        return model.init == "pretrained"
    if own == given:
        return True
    if model.init == "pretrained":
        ends = f"{origin} of model.path={model.path!r} ends responses with it as {own!r}"
        valid = f"its token {token_id} is {given!r}: {ends}; take the model's own tokenizer"
        fail("model.tokenizer", model.tokenizer, f"{valid}, or correct eos_token_id there")
    return False


def _tokens_by_id(directory: Path) -> dict[int, str]:
    """The tokens of a model's own tokenizer, from its files alone; empty if they do not tell."""
    tokens: dict[int, str] = {}
    try:
        tokenizer = _read_object(directory / "tokenizer.json")
        settings = _read_object(directory / "tokenizer_config.json")
    except ValueError:  # it is not used, which may be why another one was given
        return tokens
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        for token, token_id in vocabulary.items():
            tokens[token_id] = token
    for token_id, entry in settings.get("added_tokens_decoder", {}).items():
        tokens[int(token_id)] = entry["content"]
    for entry in tokenizer.get("added_tokens", []):
        tokens[entry["id"]] = entry["content"]
    return tokens
