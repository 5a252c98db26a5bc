"""Whether a configuration fits a model and a number of processes. Standard library only.

Called by the launcher and again by every rank, before any process group exists.
"""

from typing import Any, Optional

from megatron_zero.checks import divides, fail
from megatron_zero.config import ParallelConfig, RunConfig
from megatron_zero.hf_config import num_experts, num_positions


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


def _multiple_of_dp(path: str, value: int, dp_size: int) -> None:
    if value % dp_size:
        fail(path, value, f"must be a multiple of the data-parallel size, {dp_size}")


def _check_rollout_layout(
    config: RunConfig, hf_config: "dict[str, Any]", world_size: int, node_size: int, dp_size: int
) -> None:
    path = "rollout.tensor_model_parallel_size"
    engine_tp = config.rollout.tensor_model_parallel_size
    divides(path, engine_tp, world_size, "the number of processes")
    # An engine's ranks follow one another: it exchanges every layer's output of every token.
    divides(path, engine_tp, node_size, "the processes of a node, which an engine must not leave")
    divides(path, engine_tp, hf_config["num_attention_heads"], "the model's attention heads")
    _multiple_of_dp("batch.global_batch_size", config.batch.global_batch_size, dp_size)
    if config.loss.balance_coef and not num_experts(hf_config):
        fail("loss.balance_coef", config.loss.balance_coef, "must be 0: the model has no experts")
    longest = config.max_sample_tokens
    if "max_position_embeddings" in hf_config:
        positions, source = num_positions(hf_config)
        if longest > positions:
            path = "data.max_prompt_tokens + rollout.max_response_tokens"
            fail(path, longest, f"must be at most the model's {source}")
