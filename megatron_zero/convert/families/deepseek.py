"""DeepSeek-V2 and V3: latent attention, dense layers first, then shared and routed experts.

V3 adds a bias that only chooses experts, and multi-token-prediction layers, which HF numbers after
the decoder's and in which it stores the embedding and the output layer once more.
"""

from collections.abc import Sequence
from typing import Any

from megatron_zero.convert.families import blocks
from megatron_zero.convert.families.blocks import DECODER, Place, Rules
from megatron_zero.convert.hf_config import (
    Dims,
    HfConfig,
    expert_count,
    latent_dims,
    refuse,
    size_of,
)
from megatron_zero.convert.rules import layer_sets

MTP = Place(hf="model.layers.{mtp_layer}.", megatron="mtp.layers.{mtp}.transformer_layer.")
MTP_HEAD = Place(hf="model.layers.{mtp_layer}.", megatron="mtp.layers.{mtp}.")


def _projection(place: Place, megatron: str, hf: str, sizes: str, tp_dim: int = 0) -> Rules:
    tensor = {f"self_attn.{hf}.weight": sizes}
    return (place.rule(f"self_attention.{megatron}.weight", tensor, tp_dim=tp_dim),)


def _norm(place: Place, megatron: str, hf: str, size: str, fused_in: str) -> Rules:
    names = (f"self_attention.{megatron}.weight", f"self_attn.{hf}.weight")
    fused = f"self_attention.{fused_in}.layer_norm_weight"
    return (place.norm(*names, size, alias=fused),)


def _query(place: Place) -> Rules:
    """Queries through a low-rank bottleneck."""
    return (
        *_projection(place, "linear_q_down_proj", "q_a_proj", "q_lora_rank hidden_size"),
        *_norm(place, "q_layernorm", "q_a_layernorm", "q_lora_rank", "linear_q_up_proj"),
        *_projection(place, "linear_q_up_proj", "q_b_proj", "q_rows q_lora_rank"),
    )


def _key_value(place: Place) -> Rules:
    down = "kv_down_rows hidden_size"
    return (
        *_projection(place, "linear_kv_down_proj", "kv_a_proj_with_mqa", down),
        *_norm(place, "kv_layernorm", "kv_a_layernorm", "kv_lora_rank", "linear_kv_up_proj"),
        *_projection(place, "linear_kv_up_proj", "kv_b_proj", "kv_up_rows kv_lora_rank"),
        *_projection(place, "linear_proj", "o_proj", "hidden_size out_columns", tp_dim=1),
    )


def _mixture(place: Place, *, bias: bool) -> Rules:
    shared = ("mlp.shared_experts", "mlp.shared_experts", "shared_intermediate_size")
    rules = (*blocks.experts(place), *blocks.gate_up_down(place, *shared))
    if bias:
        tensor = {"mlp.gate.e_score_correction_bias": "num_experts"}
        rules += (place.rule("mlp.router.expert_bias", tensor, init="zeros", float32=True),)
    return rules


def _layers(*, bias: bool) -> Rules:
    return (
        DECODER.norm("input_layernorm.weight", "input_layernorm.weight"),
        *_projection(Place(layers="q_whole"), "linear_q_proj", "q_proj", "q_rows hidden_size"),
        *_query(Place(layers="q_low_rank")),
        *_key_value(DECODER),
        *blocks.swiglu(Place(layers="dense")),
        *_mixture(Place(layers="moe"), bias=bias),
    )


MTP_RULES = (
    MTP_HEAD.norm("enorm.weight", "enorm.weight"),
    MTP_HEAD.norm("hnorm.weight", "hnorm.weight"),
    MTP_HEAD.rule("eh_proj.weight", {"eh_proj.weight": "hidden_size two_hidden"}, tp_dim=0),
    MTP.norm("input_layernorm.weight", "input_layernorm.weight"),
    *_query(MTP),
    *_key_value(MTP),
    *_mixture(MTP, bias=True),
    MTP_HEAD.norm("final_layernorm.weight", "shared_head.norm.weight"),
)


def _layer_sets(hf_config: HfConfig, dims: Dims) -> dict[str, Sequence[int]]:
    layers, first = range(dims["num_hidden_layers"]), hf_config["first_k_dense_replace"]
    assert isinstance(first, int)
    kind, other = ("q_low_rank", "q_whole")[:: 1 if "q_lora_rank" in dims else -1]
    return layer_sets(dims, moe=layers[first:]) | {kind: layers, other: ()}


def _copies(dims: Dims) -> dict[str, str]:
    """The embedding and the output layer, again in every multi-token-prediction layer."""
    copies = {"embed_tokens.weight": blocks.EMBEDDING, "shared_head.head.weight": blocks.LM_HEAD}
    first = dims["num_hidden_layers"]
    return {
        f"model.layers.{layer}.{name}": original
        for layer in range(first, first + dims["mtp"])
        for name, original in copies.items()
    }


def _v2_dims(hf_config: HfConfig) -> Dims:
    per_expert = size_of(hf_config, "moe_intermediate_size")
    return latent_dims(hf_config) | {
        "num_experts": expert_count(hf_config),
        "moe_intermediate_size": per_expert,
        "shared_intermediate_size": per_expert * size_of(hf_config, "n_shared_experts"),
        "mtp": 0,
    }


def _v3_dims(hf_config: HfConfig) -> Dims:
    count = hf_config["num_nextn_predict_layers"] or 0
    if not isinstance(count, int) or (count and hf_config["q_lora_rank"] is None):
        valid = "must be a number of layers, and 0 without q_lora_rank"
        refuse(f"num_nextn_predict_layers={count!r}", valid)
    dims = _v2_dims(hf_config)
    return dims | {"mtp": count, "two_hidden": 2 * dims["hidden_size"]}


CHECKS = {
    "rms_norm_eps": ((1e-6,), "HF fixes the norms inside the attention to it"),
    "moe_layer_freq": ((1,), "every layer after the dense ones has experts"),
    "tie_word_embeddings": ((False,), "there is no tied model of this family"),
    "rope_interleave": ((True,), "rotary dims come in neighbouring pairs"),
}
COMMON: "dict[str, Any]" = {
    "rope_types": ("default", "yarn"),
    "layer_sets": _layer_sets,
    "fp8_blocks": True,
}
DEFAULTS: dict[str, object] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": False,
}

DEEPSEEK_V2 = blocks.decoder(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _layers(bias=False),
    checks={
        **CHECKS,
        "scoring_func": (("softmax",), "experts are chosen by softmax"),
        "topk_method": (("greedy", "group_limited_greedy"), "how experts are chosen"),
        "norm_topk_prob": ((False, None), "HF's V2 does not normalise the weights"),
    },
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    counts={"expert": "num_experts"},
    dims=_v2_dims,
    **COMMON,
)

DEEPSEEK_V3 = blocks.decoder(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _layers(bias=True),
    after=MTP_RULES,
    checks={
        **CHECKS,
        "scoring_func": (("sigmoid",), "experts are chosen by sigmoid"),
        "topk_method": (("noaux_tc",), "experts are chosen with a bias, in groups"),
        "norm_topk_prob": ((True,), "weights of chosen experts are normalised"),
    },
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",  # vLLM needs both written down
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    },
    counts={"expert": "num_experts", "mtp": "mtp"},
    dims=_v3_dims,
    copies=_copies,
    **COMMON,
)
