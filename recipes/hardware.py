"""What a recipe is meant to run on, and the public sizes of the models: data, no logic.

The sizes are those of each model's `config.json` on the hub, as far as layouts and memory depend on
them, so that a layout can be checked where the hub cannot be reached.
"""

from dataclasses import dataclass
from typing import Any

from recipes.paper import llama3_2_3b_numina


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A kind of GPU, and what schedulers call it.

    Slurm and Kubernetes are asked for a number of GPUs: which kinds a partition or a node pool has,
    and under which names, is each site's own.
    """

    memory_gib: float  # as the driver reports it; 0: a CPU
    skypilot: str  # as in `sky show-gpus -a`; "": none is asked for


GPUS = {
    "cpu": Gpu(memory_gib=0, skypilot=""),
    "A100-40G": Gpu(memory_gib=39.4, skypilot="A100"),
    "A100-80G": Gpu(memory_gib=79.2, skypilot="A100-80GB"),
    "H100-80G": Gpu(memory_gib=79.2, skypilot="H100"),
    "B300-288G": Gpu(memory_gib=268, skypilot="B300"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Nodes, and the GPUs of a node; of a CPU, the processes."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "A100-40G"  # of `GPUS`

    @property
    def num_processes(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory_gib(self) -> float:
        """Of one GPU; 0: a CPU."""
        return GPUS[self.gpu].memory_gib


CPU = Hardware(gpus_per_node=2, gpu="cpu")
A100_40G = Hardware()

# Recipes that are not for 8 x A100-40G.
HARDWARE = {
    "quickstart_base": CPU,
    "quickstart": CPU,
    "math_smoke": CPU,
    "qwen2_5_math_7b_80g": Hardware(gpu="A100-80G"),
    "qwen3_30b_a3b": Hardware(nodes=4, gpu="H100-80G"),
    "deepseek_v3": Hardware(nodes=32, gpu="B300-288G"),
}


def hardware_of(recipe: str) -> Hardware:
    """Of a recipe's name."""
    return HARDWARE.get(recipe, A100_40G)


_QWEN_1_5B: "dict[str, Any]" = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
_QWEN_7B = _QWEN_1_5B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
_MATH = {"max_position_embeddings": 4096}
_LLAMA_3B: "dict[str, Any]" = {
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
_QWEN3_30B: "dict[str, Any]" = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
_DEEPSEEK_V3: "dict[str, Any]" = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
}

# model.path -> config.json, in part
MODELS = {
    "Qwen/Qwen2.5-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B | _MATH,
    "Qwen/Qwen2.5-7B": _QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN_7B | _MATH,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "HuggingFaceTB/FineMath-Llama-3B": _LLAMA_3B,
    llama3_2_3b_numina().model.path: _LLAMA_3B,
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3_30B,
    "deepseek-ai/DeepSeek-V3-Base": _DEEPSEEK_V3,
}
