"""Text to token ids, the same for prompts and documents.

The one question it answers is BOS: it is put in front when the tokenizer does that by default
(Llama does, Qwen does not) and the text does not already start with it. That is what the model saw
in pretraining, and what vLLM does with a text; here ids are made once, so that the engine and the
policy read the same ones. Nothing is ever appended: some tokenizers add EOS by default, which
would end a prompt before the response.
"""

from typing import Any

from megatron_zero.config import ModelConfig, fail
from megatron_zero.data.arithmetic import build_character_tokenizer


def load_tokenizer(model: ModelConfig) -> Any:
    """A run's tokenizer: `characters`, or what transformers finds at the path or hub id.

    Raises:
        ValueError: there is none that transformers can read.
    """
    if model.tokenizer == "characters":
        return build_character_tokenizer()
    from transformers import AutoTokenizer

    name = "tokenizer" if model.tokenizer else "path"
    path = model.tokenizer or model.path
    try:
        # without the last argument it may ask a question, and wait for the answer
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        fail(f"model.{name}", path, f"transformers cannot read a tokenizer there: {reason}")


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, special tokens written in the text included."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    if not _adds_bos(tokenizer):
        return encoded
    bos = tokenizer.bos_token_id
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
