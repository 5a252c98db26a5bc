"""Mistral 7B and Mixtral: Llama's layers; Mixtral's experts are called w1, w2, w3."""

from megatron_zero.convert.families.blocks import decoder, experts, grouped_query_attention, swiglu
from megatron_zero.convert.hf_config import Checks, decoder_dims, expert_count
from megatron_zero.convert.rules import layer_sets

CHECKS: Checks = {"sliding_window": ((None,), "attention is over the whole prefix")}

MISTRAL = decoder(
    "mistral",
    "MistralForCausalLM",
    (*grouped_query_attention(), *swiglu()),
    checks=CHECKS,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)

MIXTRAL = decoder(
    "mixtral",
    "MixtralForCausalLM",
    (
        *grouped_query_attention(),
        *experts(hf="block_sparse_moe", size="intermediate_size", names=("w1", "w3", "w2")),
    ),
    checks=CHECKS | {"router_jitter_noise": ((0, None), "routing is without noise")},
    defaults={
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    rope_theta=1e6,
    counts={"expert": "num_experts"},
    dims=lambda config: decoder_dims(config) | {"num_experts": expert_count(config)},
    layer_sets=lambda config, dims: layer_sets(dims, moe=range(dims["num_hidden_layers"])),
)
