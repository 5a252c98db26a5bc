"""Mistral 7B and Mixtral: Llama's layers; Mixtral's experts are called w1, w2, w3."""

from megatron_zero.convert.families import blocks
from megatron_zero.convert.hf_config import ConfigCheck, Dims, HfConfig, decoder_dims, expert_count
from megatron_zero.convert.rules import Family, every_layer_moe

CHECKS = (
    *blocks.checks(),
    ConfigCheck("sliding_window", (None,), "attention is over the whole prefix"),
)

MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    rules=blocks.dense(blocks.grouped_query_attention()),
    tied_rules=blocks.TIED,
    untied_rules=blocks.UNTIED,
    checks=CHECKS,
    defaults={**blocks.DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    ignored=blocks.ROTARY,
)


def _mixtral_dims(hf_config: HfConfig) -> Dims:
    return decoder_dims(hf_config) | {"num_experts": expert_count(hf_config)}


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    rules=(
        *blocks.FIRST,
        *blocks.grouped_query_attention(),
        *blocks.experts(hf="block_sparse_moe", size="intermediate_size", names=("w1", "w3", "w2")),
        *blocks.LAST,
    ),
    tied_rules=blocks.TIED,
    untied_rules=blocks.UNTIED,
    checks=(*CHECKS, ConfigCheck("router_jitter_noise", (0, None), "routing is without noise")),
    defaults={
        **blocks.DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    rope_theta=1e6,
    ignored=blocks.ROTARY,
    counts={"expert": "num_experts"},
    dims=_mixtral_dims,
    layer_sets=every_layer_moe,
)
