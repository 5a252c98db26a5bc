"""The families that can be converted, by HF `model_type`. A new one is one table, listed here."""

from typing import Optional

from megatron_zero.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_zero.convert.families.llama import LLAMA
from megatron_zero.convert.families.mistral import MISTRAL, MIXTRAL
from megatron_zero.convert.families.qwen2 import QWEN2
from megatron_zero.convert.families.qwen3 import QWEN3, QWEN3_MOE
from megatron_zero.convert.hf_config import HfConfig, refuse
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.rules import Family

_ALL = (QWEN2, QWEN3, LLAMA, MISTRAL, QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_for(hf_config: HfConfig) -> Family:
    """The family of a `config.json`.

    Raises:
        ValueError: if `model_type` is missing or has no table, listing those that have one.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        refuse(f"model_type={model_type!r}", f"must be one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def mapping_for(
    hf_config: HfConfig, padded_vocab_size: Optional[int] = None, *, with_mtp: bool = True
) -> Mapping:
    """The mapping of one model; see `Mapping` for the arguments."""
    return Mapping(family_for(hf_config), hf_config, padded_vocab_size, with_mtp=with_mtp)
