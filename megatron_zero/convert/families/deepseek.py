"""DeepSeek-V2 and V3: latent attention, dense layers first, then shared and routed experts.

V3 adds a bias that only chooses experts, and multi-token-prediction layers, which HF numbers after
the decoder's and in which it stores the embedding and the output layer once more.
"""

from collections.abc import Sequence

from megatron_zero.convert.families.blocks import (
    DECODER,
    DEFAULTS,
    EMBEDDING,
    FIRST,
    LAST,
    LM_HEAD,
    ROTARY,
    UNTIED,
    Place,
    Rules,
    checks,
    experts,
    gate_up_down,
    swiglu,
)
from megatron_zero.convert.hf_config import (
    ConfigCheck,
    Dims,
    HfConfig,
    expert_count,
    latent_dims,
    size_of,
)
from megatron_zero.convert.rules import Family

DENSE, MOE = Place(layers="dense"), Place(layers="moe")
MTP = Place(hf="model.layers.{mtp_layer}.", megatron="mtp.layers.{mtp}.transformer_layer.")
MTP_HEAD = Place(hf="model.layers.{mtp_layer}.", megatron="mtp.layers.{mtp}.")


def _query(place: Place) -> Rules:
    """Queries through a low-rank bottleneck."""
    attention, hf = "self_attention.", "self_attn."
    fused = attention + "linear_q_up_proj.layer_norm_weight"
    down, up = ("q_lora_rank", "hidden_size"), ("q_rows", "q_lora_rank")
    return (
        place.copy(attention + "linear_q_down_proj.weight", hf + "q_a_proj.weight", down, tp_dim=0),
        place.norm(
            attention + "q_layernorm.weight", hf + "q_a_layernorm.weight", "q_lora_rank", fused
        ),
        place.copy(attention + "linear_q_up_proj.weight", hf + "q_b_proj.weight", up, tp_dim=0),
    )


def _key_value(place: Place) -> Rules:
    attention, hf = "self_attention.", "self_attn."
    fused = attention + "linear_kv_up_proj.layer_norm_weight"
    down, up = ("kv_down_rows", "hidden_size"), ("kv_up_rows", "kv_lora_rank")
    out = ("hidden_size", "out_columns")
    return (
        place.copy(
            attention + "linear_kv_down_proj.weight",
            hf + "kv_a_proj_with_mqa.weight",
            down,
            tp_dim=0,
        ),
        place.norm(
            attention + "kv_layernorm.weight", hf + "kv_a_layernorm.weight", "kv_lora_rank", fused
        ),
        place.copy(attention + "linear_kv_up_proj.weight", hf + "kv_b_proj.weight", up, tp_dim=0),
        place.copy(attention + "linear_proj.weight", hf + "o_proj.weight", out, tp_dim=1),
    )


def _norm(place: Place) -> Rules:
    return (place.norm("input_layernorm.weight", "input_layernorm.weight", "hidden_size"),)


def _mixture(place: Place, *, bias: bool) -> Rules:
    shared = ("mlp.shared_experts", "mlp.shared_experts", "shared_intermediate_size")
    router_bias = ("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("num_experts",))
    rules = (*experts(place=place), *gate_up_down(*shared, place=place))
    return (*rules, place.copy(*router_bias, init="zeros", float32=True)) if bias else rules


def _decoder(*, bias: bool) -> Rules:
    return (
        *FIRST,
        *_norm(DECODER),
        Place(layers="q_whole").copy(
            "self_attention.linear_q_proj.weight",
            "self_attn.q_proj.weight",
            ("q_rows", "hidden_size"),
            tp_dim=0,
        ),
        *_query(Place(layers="q_low_rank")),
        *_key_value(DECODER),
        *swiglu(place=DENSE),
        *_mixture(MOE, bias=bias),
        *LAST,
    )


MTP_RULES = (
    MTP_HEAD.norm("enorm.weight", "enorm.weight", "hidden_size"),
    MTP_HEAD.norm("hnorm.weight", "hnorm.weight", "hidden_size"),
    MTP_HEAD.copy("eh_proj.weight", "eh_proj.weight", ("hidden_size", "two_hidden"), tp_dim=0),
    *_norm(MTP),
    *_query(MTP),
    *_key_value(MTP),
    *_mixture(MTP, bias=True),
    MTP_HEAD.norm("final_layernorm.weight", "shared_head.norm.weight", "hidden_size"),
)


def _layer_sets(hf_config: HfConfig, dims: Dims) -> dict[str, Sequence[int]]:
    layers, first = range(dims["num_hidden_layers"]), hf_config["first_k_dense_replace"]
    assert isinstance(first, int)
    low_rank = hf_config["q_lora_rank"] is not None
    return {
        "all": layers,
        "dense": layers[:first],
        "moe": layers[first:],
        "q_low_rank": layers if low_rank else (),
        "q_whole": () if low_rank else layers,
    }


def _copies(dims: Dims) -> dict[str, str]:
    """The embedding and the output layer, again in every multi-token-prediction layer."""
    first, count = dims["num_hidden_layers"], dims["mtp"]
    return {
        f"model.layers.{layer}.{name}": original
        for layer in range(first, first + count)
        for name, original in (
            ("embed_tokens.weight", EMBEDDING.name),
            ("shared_head.head.weight", LM_HEAD.name),
        )
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
        raise ValueError(
            f"HF config num_nextn_predict_layers={count!r}: must be a number of layers, and 0 "
            "without q_lora_rank"
        )
    dims = _v2_dims(hf_config)
    return dims | {"mtp": count, "two_hidden": 2 * dims["hidden_size"]}


CHECKS = (
    *checks(),
    ConfigCheck("rms_norm_eps", (1e-6,), "HF fixes the norms inside the attention to it"),
    ConfigCheck("moe_layer_freq", (1,), "every layer after the dense ones has experts"),
    ConfigCheck("tie_word_embeddings", (False,), "there is no tied model of this family"),
    ConfigCheck("rope_interleave", (True,), "rotary dims come in neighbouring pairs"),
)
COMMON_DEFAULTS: dict[str, object] = {
    **DEFAULTS,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": False,
}

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    rules=_decoder(bias=False),
    tied_rules=(),
    untied_rules=UNTIED,
    checks=(
        *CHECKS,
        ConfigCheck("scoring_func", ("softmax",), "experts are chosen by softmax"),
        ConfigCheck("topk_method", ("greedy", "group_limited_greedy"), "how experts are chosen"),
        ConfigCheck("norm_topk_prob", (False, None), "HF's V2 does not normalise the weights"),
    ),
    defaults={
        **COMMON_DEFAULTS,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    rope_types=("default", "yarn"),
    ignored=ROTARY,
    counts={"expert": "num_experts"},
    dims=_v2_dims,
    layer_sets=_layer_sets,
    fp8_blocks=True,
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    rules=(*_decoder(bias=True), *MTP_RULES),
    tied_rules=(),
    untied_rules=UNTIED,
    checks=(
        *CHECKS,
        ConfigCheck("scoring_func", ("sigmoid",), "experts are chosen by sigmoid"),
        ConfigCheck("topk_method", ("noaux_tc",), "experts are chosen with a bias, in groups"),
        ConfigCheck("norm_topk_prob", (True,), "weights of chosen experts are normalised"),
    ),
    defaults={
        **COMMON_DEFAULTS,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    },
    rope_types=("default", "yarn"),
    ignored=ROTARY,
    counts={"expert": "num_experts", "mtp": "mtp"},
    dims=_v3_dims,
    layer_sets=_layer_sets,
    copies=_copies,
    fp8_blocks=True,
)
