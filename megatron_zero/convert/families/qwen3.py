"""Qwen3, dense and mixture of experts: norms of q and k per head, no biases."""

from collections.abc import Sequence

from megatron_zero.convert.families import blocks
from megatron_zero.convert.families.blocks import Place, decoder, swiglu
from megatron_zero.convert.hf_config import Dims, HfConfig, decoder_dims, expert_count, size_of
from megatron_zero.convert.rules import layer_sets

ATTENTION = blocks.grouped_query_attention(qk_norm=True)

ROPE_TYPES = ("default", "yarn")

QWEN3 = decoder(
    "qwen3",
    "Qwen3ForCausalLM",
    (*ATTENTION, *swiglu()),
    defaults={"head_dim": 128},
    rope_types=ROPE_TYPES,
)


def _moe_dims(hf_config: HfConfig) -> Dims:
    size = size_of(hf_config, "moe_intermediate_size")
    experts = {"num_experts": expert_count(hf_config), "moe_intermediate_size": size}
    return decoder_dims(hf_config) | experts


def _layer_sets(hf_config: HfConfig, dims: Dims) -> dict[str, Sequence[int]]:
    """Every `decoder_sparse_step`-th layer has experts, but for those listed."""
    layers, step = range(dims["num_hidden_layers"]), size_of(hf_config, "decoder_sparse_step")
    listed = hf_config.get("mlp_only_layers") or ()
    return layer_sets(dims, moe={i for i in layers if (i + 1) % step == 0} - set(listed))  # type: ignore[call-overload]


QWEN3_MOE = decoder(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (*ATTENTION, *swiglu(Place(layers="dense")), *blocks.experts(Place(layers="moe"))),
    checks={"norm_topk_prob": ((True, False), "it is true or false")},
    defaults={
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    counts={"expert": "num_experts"},
    dims=_moe_dims,
    layer_sets=_layer_sets,
    rope_types=ROPE_TYPES,
)
