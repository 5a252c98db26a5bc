"""Mistral 7B and Mixtral: Llama's layers; Mixtral's experts are called w1, w2, w3."""

from megatron_zero.convert.families.blocks import (
    DEFAULTS,
    FIRST,
    LAST,
    ROTARY,
    TIED,
    UNTIED,
    checks,
    dense,
    experts,
    grouped_query_attention,
)
from megatron_zero.convert.hf_config import ConfigCheck, Dims, HfConfig, decoder_dims, expert_count
from megatron_zero.convert.rules import Family, every_layer_moe

CHECKS = (*checks(), ConfigCheck("sliding_window", (None,), "attention is over the whole prefix"))

MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    rules=dense(grouped_query_attention()),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=CHECKS,
    defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    ignored=ROTARY,
)


def _mixtral_dims(hf_config: HfConfig) -> Dims:
    return decoder_dims(hf_config) | {"num_experts": expert_count(hf_config)}


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    rules=(
        *FIRST,
        *grouped_query_attention(),
        *experts(hf="block_sparse_moe", size="intermediate_size", names=("w1", "w3", "w2")),
        *LAST,
    ),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=(*CHECKS, ConfigCheck("router_jitter_noise", (0, None), "routing is without noise")),
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    rope_theta=1e6,
    ignored=ROTARY,
    counts={"expert": "num_experts"},
    dims=_mixtral_dims,
    layer_sets=every_layer_moe,
)
