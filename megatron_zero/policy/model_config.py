"""HF config -> Megatron's `TransformerConfig`: what the tables cannot say, the mathematics of it.

What has a bias or a norm follows from the family's table (`Mapping`): a parameter that no rule maps
must not exist, so the model is built from the names. The rest are numbers of `config.json`.
"""

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_zero.checks import UserError
from megatron_zero.config import ParallelConfig
from megatron_zero.convert.hf_config import ORIGINAL_LENGTH
from megatron_zero.convert.mapping import Mapping
from megatron_zero.policy.rotary import attention_factor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
INIT_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
YARN = (ORIGINAL_LENGTH, "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LAYER = "decoder.layers.0.self_attention."


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    more: dict[str, Any] = {"recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        more = {"recompute_modules": ["core_attn"]}
    granularity = {"recompute_granularity": parallel.recompute}
    return {} if parallel.recompute == "none" else granularity | more


def _interleaving(parallel: ParallelConfig) -> dict[str, Any]:
    """How chunks of an interleaved pipeline exchange activations.

    With two stages a batched exchange gives wrong gradients (both neighbours are the same rank),
    and overlapped ones do on gloo when a sent output's memory is given back at once; with more
    stages the batched exchange is right.
    """
    size = parallel.virtual_pipeline_model_parallel_size
    if size == 1:
        return {}
    settings: dict[str, Any] = {"virtual_pipeline_model_parallel_size": size}
    if parallel.pipeline_model_parallel_size == 2:
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings | {"deallocate_pipeline_outputs": False}


def _experts(mapping: Mapping, dtype: torch.dtype, *, with_te: bool) -> dict[str, Any]:
    """Routing as the family's HF class does it; `policy.balance` can add an auxiliary loss."""
    config, dims = mapping.config, mapping.dims
    moe = set(mapping.layer_sets["moe"])
    per_expert = dims.get("moe_intermediate_size", dims["intermediate_size"])
    settings: dict[str, Any] = {
        "num_moe_experts": dims["num_experts"],
        "moe_ffn_hidden_size": per_expert,
        "moe_layer_freq": [int(layer in moe) for layer in mapping.layer_sets["all"]],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        "moe_grouped_gemm": with_te,
        # Weights of the chosen experts: normalised (softmax over them alone) or as they are.
        "moe_router_pre_softmax": not config["norm_topk_prob"],
    }
    if "shared_intermediate_size" in dims:
        settings |= {
            "moe_shared_expert_intermediate_size": dims["shared_intermediate_size"],
            "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        }
        if config.get("topk_method") != "greedy" and config["n_group"]:
            settings |= {
                "moe_router_num_groups": config["n_group"],
                "moe_router_group_topk": config["topk_group"],
            }
    if mapping.family.model_type == "deepseek_v3":
        settings |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            # The bias stays as it was loaded: it chooses experts and is no trained parameter.
            "moe_router_bias_update_rate": 0.0,
            "moe_router_pre_softmax": False,
        }
    return settings


def _latent_attention(mapping: Mapping) -> dict[str, Any]:
    """DeepSeek's attention; with YaRN, `mscale` as HF's `attention_factor` has it."""
    dims, rope = mapping.dims, mapping.rope
    settings: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": dims.get("q_lora_rank"),
        "kv_lora_rank": dims["kv_lora_rank"],
        "qk_head_dim": dims["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": dims["qk_rope_head_dim"],
        "v_head_dim": dims["v_head_dim"],
        "rotary_base": rope.theta,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
    if rope.rope_type == "yarn":
        if set(rope.scaling) != set(YARN) or not rope.truncate:
            raise UserError(f"HF config rope_parameters: YaRN needs exactly {sorted(YARN)}")
        settings |= rope.scaling
        settings["rope_type"], settings["rotary_scaling_factor"] = "yarn", settings.pop("factor")
        settings[ORIGINAL_LENGTH] = int(settings[ORIGINAL_LENGTH])
    return settings


def transformer_config(
    mapping: Mapping, parallel: ParallelConfig, dtype: torch.dtype, *, with_te: bool
) -> TransformerConfig:
    """Megatron's configuration of a mapped model in this layout.

    Raises:
        ValueError: the config asks for something that the policy does not compute.
    """
    config, dims, names = mapping.config, mapping.dims, set(mapping.megatron_names())
    on_gpu = torch.cuda.is_available()
    is_latent = "kv_lora_rank" in dims
    more = _recompute(parallel) | _interleaving(parallel)
    if "num_experts" in dims:
        more |= _experts(mapping, dtype, with_te=with_te)
    if is_latent:
        more |= _latent_attention(mapping)
    else:
        more["kv_channels"] = dims["head_dim"]
        if mapping.rope.rope_type == "yarn":
            scores = attention_factor(mapping.rope) ** 2  # of queries and of keys
            more["softmax_scale"] = scores / math.sqrt(dims["head_dim"])
    return (MLATransformerConfig if is_latent else TransformerConfig)(
        num_layers=dims["num_hidden_layers"],
        hidden_size=dims["hidden_size"],
        ffn_hidden_size=dims["intermediate_size"],
        num_attention_heads=dims["num_attention_heads"],
        num_query_groups=dims["num_key_value_heads"],
        layernorm_epsilon=config["rms_norm_eps"],  # type: ignore[arg-type]
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=LAYER + "linear_qkv.bias" in names,
        qk_layernorm=is_latent or LAYER + "q_layernorm.weight" in names,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        **parallel.megatron_sizes,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are loaded, never drawn. Not `perform_initialization=False`: that also leaves
        # out the marks by which the gradient norm tells sharded parameters from replicated ones.
        **dict.fromkeys(INIT_METHODS, _leave_unset),
        use_cpu_initialization=not on_gpu,
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, dense models too
        calculate_per_token_loss=True,  # the sum contract, see policy/forward.py
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=with_te and not is_latent,
        persist_layer_norm=with_te,
        **more,
    )
