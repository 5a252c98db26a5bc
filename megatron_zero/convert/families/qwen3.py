"""Qwen3, dense and mixture of experts: norms of q and k per head, no biases."""

from collections.abc import Sequence

from megatron_zero.convert.families.blocks import (
    DEFAULTS,
    FIRST,
    LAST,
    ROTARY,
    TIED,
    UNTIED,
    Place,
    checks,
    dense,
    experts,
    grouped_query_attention,
    swiglu,
)
from megatron_zero.convert.hf_config import (
    ConfigCheck,
    Dims,
    HfConfig,
    decoder_dims,
    expert_count,
    size_of,
)
from megatron_zero.convert.rules import Family

QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    rules=dense(grouped_query_attention(qk_norm=True)),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=checks(),
    defaults={**DEFAULTS, "head_dim": 128},
    ignored=ROTARY,
)


def _moe_dims(hf_config: HfConfig) -> Dims:
    return decoder_dims(hf_config) | {
        "num_experts": expert_count(hf_config),
        "moe_intermediate_size": size_of(hf_config, "moe_intermediate_size"),
    }


def _layer_sets(hf_config: HfConfig, dims: Dims) -> dict[str, Sequence[int]]:
    """Every `decoder_sparse_step`-th layer has experts, but for those listed."""
    layers, step = range(dims["num_hidden_layers"]), size_of(hf_config, "decoder_sparse_step")
    listed = hf_config.get("mlp_only_layers") or ()
    moe = [i for i in layers if i not in listed and (i + 1) % step == 0]  # type: ignore[operator]
    return {"all": layers, "moe": moe, "dense": [i for i in layers if i not in moe]}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    rules=(
        *FIRST,
        *grouped_query_attention(qk_norm=True),
        *swiglu(place=Place(layers="dense")),
        *experts(place=Place(layers="moe")),
        *LAST,
    ),
    tied_rules=TIED,
    untied_rules=UNTIED,
    checks=(*checks(), ConfigCheck("norm_topk_prob", (True, False), "it is true or false")),
    defaults={
        **DEFAULTS,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    ignored=ROTARY,
    counts={"expert": "num_experts"},
    dims=_moe_dims,
    layer_sets=_layer_sets,
)
