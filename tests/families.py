"""A tiny model of every family that can be converted, and its checkpoint."""

from pathlib import Path
from typing import Any

import torch

from tests import tiny

_DENSE = {"head_dim": None}
_MOE = {"num_hidden_layers": 4, "num_experts_per_tok": 2}
_LATENT = {
    **_MOE,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (HF class, what differs from tiny.hf_config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 48}),
    "llama": ("Llama", {**_DENSE, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_DENSE, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_MOE,
            "head_dim": 32,
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "mixtral": (
        "Mixtral",
        {**_MOE, "head_dim": None, "num_local_experts": 4, "sliding_window": None},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, "n_group": 4, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "rope_parameters": _YARN},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "n_group": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "rope_parameters": _YARN,
            "num_nextn_predict_layers": 0,
        },
    ),
}


# Of one layer and 32 dims, for long sequences: no family of its own.
NARROW: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_narrow": (
        "Qwen2",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "max_position_embeddings": 16384,
        },
    )
}

# Positions beyond the original length of 16: no family of its own, but other rotary embeddings.
STRETCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "max_position_embeddings": 64,
        },
    ),
    "qwen3_yarn": (
        "Qwen3",
        {
            "head_dim": 48,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.3,
                "beta_fast": 2.0,
                "beta_slow": 0.1,
                "truncate": False,
            },
            "max_position_embeddings": 128,
        },
    ),
}

MODEL_TYPES = {"qwen2_tied": "qwen2", "deepseek_v2_lite": "deepseek_v2"}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A `config.json` of the family, as one finds it: without what transformers would fill in."""
    config = tiny.hf_config(**{"tied": False, **FAMILIES[name][1]})
    config["model_type"] = MODEL_TYPES.get(name, name)
    del config["architectures"]
    return config | changes


def hf_model(name: str, **more: Any) -> torch.nn.Module:
    """The family's tiny model in float32, all of its weights as unlike one another as trained.

    Args:
        more: of its config, over the family's.
    """
    import transformers

    hf_class, changes = (FAMILIES | NARROW | STRETCHED)[name]
    changes = changes | more
    config = tiny.hf_config(**{"tied": False, **changes})
    config["tie_word_embeddings"] = bool(changes.get("tie_word_embeddings"))
    del config["model_type"], config["architectures"]
    torch.manual_seed(0)
    model = getattr(transformers, f"{hf_class}ForCausalLM")(
        getattr(transformers, f"{hf_class}Config")(**config)
    ).eval()
    with torch.no_grad():
        for param_name, param in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in param_name:
                continue
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
            elif param_name.endswith("gate.weight"):  # routers: choices that rounding cannot turn
                param.mul_(20)
    return model


def write(name: str, directory: Path, **more: Any) -> torch.nn.Module:
    """`hf_model(name, **more)`, saved as an HF checkpoint."""
    model = hf_model(name, **more)
    model.save_pretrained(directory)
    return model
