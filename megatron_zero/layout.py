"""Whether a configuration fits a model and a number of processes. Standard library only.

Called by the launcher and again by every rank, before any process group exists.
"""

from typing import Any, Optional

from megatron_zero.checks import divides, fail
from megatron_zero.config import ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from megatron_zero.hf_config import num_experts, num_positions

# What vLLM's attention kernels for CPUs are built for, in every dtype; a test asks the kernels.
# The list of `CPUAttentionBackend.get_supported_head_sizes` lacks 48, which is there.
CPU_HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of data-parallel replicas of `parallel` in a world of `world_size` processes."""
    path = "parallel.tensor_model_parallel_size * pipeline_model_parallel_size"
    size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if parallel.context_parallel_size > 1:
        path += " * context_parallel_size"
        size *= parallel.context_parallel_size
    divides(path, size, world_size, "the number of processes")
    return world_size // size


def check_layout(
    config: Any, hf_config: "dict[str, Any]", world_size: int, node_size: "Optional[int]" = None
) -> None:
    """Refuse a layout that cannot run: called before any process group exists.

    Args:
        config: a `RunConfig` or `PretrainConfig`.
        hf_config: the model's `config.json`.
        world_size: number of processes of the job.
        node_size: of those, how many a node has; None: all of them.

    Raises:
        ValueError: with the setting's path, its value and what would be valid.
    """
    parallel = config.parallel
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp_size = data_parallel_size(parallel, world_size)
    heads, path = hf_config["num_attention_heads"], "parallel.tensor_model_parallel_size"
    kv_heads = hf_config.get("num_key_value_heads") or heads
    divides(path, tp_size, heads, "the model's attention heads")
    if kv_heads % tp_size and tp_size % kv_heads:
        fail(path, tp_size, f"must divide, or be a multiple of, the model's {kv_heads} KV heads")
    divides(path, tp_size, hf_config["intermediate_size"], "the model's intermediate_size")
    path, vp_size = "parallel.pipeline_model_parallel_size", 1
    if parallel.virtual_pipeline_model_parallel_size > 1:
        vp_size = parallel.virtual_pipeline_model_parallel_size
        path += " * virtual_pipeline_model_parallel_size"
    divides(path, pp_size * vp_size, hf_config["num_hidden_layers"], "the model's layers")
    _check_experts(parallel, num_experts(hf_config), world_size)
    if isinstance(config, RunConfig):
        _check_rollout_layout(config, hf_config, world_size, node_size or world_size, dp_size)
    else:
        sequences = config.documents.sequences_per_step
        _multiple_of_dp("documents.sequences_per_step", sequences, dp_size)


def _check_experts(parallel: ParallelConfig, experts: int, world_size: int) -> None:
    """Experts have a layout of their own on the ranks of each pipeline stage."""
    tp_size, ep_size = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    etp_size = parallel.expert_tensor_parallel_size
    path, inner = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
    if not experts:
        for name, size in ((path, ep_size), (inner, etp_size)):
            if size > 1:
                fail(name, size, "must be 1: the model has no experts")
        return
    divides(path, ep_size, experts, "the model's experts")
    stage = world_size // parallel.pipeline_model_parallel_size
    divides(f"{path} * {inner}", ep_size * etp_size, stage, "the processes of a pipeline stage")
    if tp_size > 1 and not parallel.sequence_parallel:
        valid = "must be true: Megatron routes tokens that are split over TP"
        fail("parallel.sequence_parallel", False, valid)
    if ep_size == 1 and etp_size != tp_size:
        # Megatron-Core 0.16.1 would leave the experts' gradients unreduced over TP.
        valid = f"must be tensor_model_parallel_size={tp_size} without expert parallelism"
        fail(inner, etp_size, valid)


def check_engine_layout(
    rollout: RolloutConfig, hf_config: "dict[str, Any]", world_size: int, node_size: int
) -> None:
    """Refuse an engine that the processes cannot share, or that cannot cut the model so.

    Args:
        rollout: the section `rollout`.
        hf_config: the model's `config.json`.
        world_size: number of processes of the job.
        node_size: of those, how many a node has.

    Raises:
        ValueError: with the setting's path, its value and what would be valid.
    """
    path, tp_size = "rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size
    divides(path, tp_size, world_size, "the number of processes")
    # An engine's ranks follow one another: it exchanges every layer's output of every token.
    divides(path, tp_size, node_size, "the processes of a node, which an engine must not leave")
    heads = hf_config["num_attention_heads"]
    divides(path, tp_size, heads, "the model's attention heads")
    kv_heads = hf_config.get("num_key_value_heads") or heads
    if kv_heads % tp_size and tp_size % kv_heads:
        valid = f"must divide, or be a multiple of, the model's {kv_heads} KV heads"
        fail(path, tp_size, valid)
    for name in ("intermediate_size", "moe_intermediate_size"):
        if hf_config.get(name):
            divides(path, tp_size, hf_config[name], f"the model's {name}")


def check_cpu_engine(model: ModelConfig, hf_config: "dict[str, Any]") -> None:
    """Refuse a model for which vLLM has no attention on a CPU; on a GPU it has others.

    Args:
        model: the section `model`.
        hf_config: the model's `config.json`.

    Raises:
        ValueError: with the model's size, and those that there are.
    """
    setting, value = "model.path", model.path
    if hf_config.get("kv_lora_rank"):  # latent attention (DeepSeek)
        for name, size in CPU_LATENT_SIZES.items():
            if hf_config[name] != size:
                valid = (
                    f"{name}={hf_config[name]}: on a CPU vLLM's latent attention has only {size}"
                )
                fail(setting, value, valid)
        return
    hidden_size, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    head_dim = hf_config.get("head_dim") or hidden_size // heads
    if head_dim in CPU_HEAD_DIMS:
        return
    valid = f"on a CPU vLLM's attention has only heads of {', '.join(map(str, CPU_HEAD_DIMS))}"
    if not model.path:
        setting = "model.architecture.hidden_size / num_attention_heads"
        fail(setting, head_dim, valid)
    fail(setting, value, f"head_dim={head_dim}: {valid}")


def _multiple_of_dp(path: str, value: int, dp_size: int) -> None:
    if value % dp_size:
        fail(path, value, f"must be a multiple of the data-parallel size, {dp_size}")


def _check_rollout_layout(
    config: RunConfig, hf_config: "dict[str, Any]", world_size: int, node_size: int, dp_size: int
) -> None:
    check_engine_layout(config.rollout, hf_config, world_size, node_size)
    _multiple_of_dp("batch.global_batch_size", config.batch.global_batch_size, dp_size)
    if config.loss.balance_coef and not num_experts(hf_config):
        fail("loss.balance_coef", config.loss.balance_coef, "must be 0: the model has no experts")
    longest = config.max_sample_tokens
    if "max_position_embeddings" in hf_config:
        positions, source = num_positions(hf_config)
        if longest > positions:
            path = "data.max_prompt_tokens + rollout.max_response_tokens"
            fail(path, longest, f"must be at most the model's {source}")
