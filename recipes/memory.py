"""How much of a GPU a layout needs, from the model's public sizes: arithmetic, no torch.

What stays on a GPU for the whole run, in bf16 with Megatron's distributed optimizer:

    weights      2 bytes  x  this rank's parameters
    gradients    4 bytes  x  this rank's parameters (float32 buffers)
    optimizer   12 bytes  x  this rank's parameters / replicas (float32 weight, two moments)
    reference    2 bytes  x  this rank's parameters, where a KL term needs it

A rank's parameters: what is not an expert is cut over TP and PP, experts over EP x ETP and PP. A
colocated engine has 2 bytes x all parameters / its TP, within `gpu_memory_utilization` of the GPU;
it sleeps while the policy trains, so activations take its place and are not added.
Norms, which every TP rank keeps whole, are counted as if cut: below 0.1 % of any model here.
"""

from dataclasses import dataclass
from typing import Any, Union

from megatron_zero.config import PretrainConfig, RunConfig
from megatron_zero.hf_config import num_experts

GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters: embedding and output layer, and each layer's parts."""

    ends: "list[int]"  # embedding; output layer where it is not the embedding's
    layers: "list[int]"  # by layer, without routed experts
    experts: "list[int]"  # by layer, all routed experts together

    @property
    def total(self) -> int:
        return sum(self.ends) + sum(self.layers) + sum(self.experts)


def count_parameters(hf_config: "dict[str, Any]") -> Parameters:
    """Parameters of a `config.json`, multi-token prediction left out."""
    hidden, layers = hf_config["hidden_size"], hf_config["num_hidden_layers"]
    embedding = hf_config["vocab_size"] * hidden
    per_expert = 3 * hidden * hf_config.get("moe_intermediate_size", 0)
    routed, shared = num_experts(hf_config), hf_config.get("n_shared_experts", 0)
    num_dense = hf_config.get("first_k_dense_replace", 0) if routed else layers
    bias = routed if hf_config["model_type"] == "deepseek_v3" else 0  # chooses experts
    moe = routed * hidden + bias + shared * per_expert
    dense = 3 * hidden * hf_config["intermediate_size"]
    common = _attention(hf_config) + 2 * hidden  # two norms
    return Parameters(
        # the final norm is counted with the embedding
        ends=[embedding + hidden, 0 if hf_config["tie_word_embeddings"] else embedding],
        layers=[common + (dense if layer < num_dense else moe) for layer in range(layers)],
        experts=[0 if layer < num_dense else routed * per_expert for layer in range(layers)],
    )


def _attention(hf_config: "dict[str, Any]") -> int:
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    if "kv_lora_rank" in hf_config:  # latent attention
        q_rank, kv_rank = hf_config["q_lora_rank"], hf_config["kv_lora_rank"]
        nope, rope = hf_config["qk_nope_head_dim"], hf_config["qk_rope_head_dim"]
        value = hf_config["v_head_dim"]
        query = hidden * q_rank + q_rank + q_rank * heads * (nope + rope)
        key_value = hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value)
        return query + key_value + heads * value * hidden
    head_dim = hf_config.get("head_dim") or hidden // heads
    query, key_value = heads * head_dim, hf_config["num_key_value_heads"] * head_dim
    more = {"qwen2": query + 2 * key_value, "qwen3_moe": 2 * head_dim}  # biases; two norms
    return hidden * (2 * query + 2 * key_value) + more.get(hf_config["model_type"], 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """GiB of one GPU, on the fullest pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    engine_weights: float
    engine: float  # all that the engine may take, its weights included

    @property
    def policy(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        return self.policy + self.engine


def memory_of(
    config: "Union[RunConfig, PretrainConfig]",
    hf_config: "dict[str, Any]",
    *,
    num_processes: int,
    gpu_gib: float,
) -> Memory:
    """What stays on each GPU, by part; see the module's docstring for what is counted."""
    parallel, counts = config.parallel, count_parameters(hf_config)
    pp_size = parallel.pipeline_model_parallel_size
    tp_size = parallel.tensor_model_parallel_size
    expert_size = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    per_stage = len(counts.layers) // pp_size
    stages = []
    for stage in range(pp_size):
        layers = slice(stage * per_stage, (stage + 1) * per_stage)
        ends = counts.ends[0] * (stage == 0) + counts.ends[1] * (stage == pp_size - 1)
        own = (ends + sum(counts.layers[layers])) / tp_size
        own_experts = sum(counts.experts[layers]) / expert_size
        on_stage = num_processes / pp_size
        sharded = own * tp_size / on_stage + own_experts * expert_size / on_stage
        stages.append((own + own_experts, sharded))
    # without the distributed optimizer every replica keeps all of it
    distributed = parallel.use_distributed_optimizer
    fullest, sharded = max((n, s if distributed else n) for n, s in stages)
    is_train = isinstance(config, RunConfig)
    return Memory(
        weights=2 * fullest / GIB,
        gradients=4 * fullest / GIB,
        optimizer=12 * sharded / GIB,
        reference=2 * fullest / GIB if is_train and config.needs_ref_policy else 0.0,
        engine_weights=(
            2 * counts.total / config.rollout.tensor_model_parallel_size / GIB if is_train else 0.0
        ),
        engine=config.rollout.gpu_memory_utilization * gpu_gib if is_train else 0.0,
    )
