"""From a configuration to the parts that the loops use: model files, policy, prompts."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_zero.batching import Packing
from megatron_zero.config import ParallelConfig, RunConfig
from megatron_zero.config_io import Config
from megatron_zero.convert.cost import attention_break_even
from megatron_zero.convert.dist_checkpoint import is_checkpoint
from megatron_zero.convert.families import family_for
from megatron_zero.convert.hf_dir import local_directory, open_source
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.convert.safetensors_io import write_hf_checkpoint
from megatron_zero.convert.sources import TensorSource
from megatron_zero.data.datasets import load_rows
from megatron_zero.data.encoding import load_tokenizer
from megatron_zero.data.prompts import PromptCursor, build_prompts
from megatron_zero.data.stop_tokens import describe_stop_tokens, stop_token_ids
from megatron_zero.grading import check_golds
from megatron_zero.launch_args import progress
from megatron_zero.model_files import (
    check_weights,
    complete_hf_config,
    exported_config,
    stored_corrections,
    write_model_files,
)
from megatron_zero.observability.environment import collect_environment
from megatron_zero.observability.run_dir import RunDir, create_run_dir
from megatron_zero.observability.watchdog import watch_failures, watch_hosts
from megatron_zero.policy.model import padded_vocab_size
from megatron_zero.policy.parallel import Topology, initialize
from megatron_zero.policy.policy import Policy

logger = logging.getLogger(__name__)


def start_run(
    config: Config, *, resume: bool
) -> tuple[Topology, RunDir, Any, dict[str, Any], tuple[int, ...]]:
    """Join the job, make the run directory and its model files; collective.

    Returns:
        Topology, run directory, tokenizer, the completed HF config, and the tokens that end a
        response.

    Raises:
        ValueError: no such model or tokenizer, files of it that are damaged or do not belong
            together, or the directory holds another run's results.
    """
    progress("joining the other processes; model files")
    watch_failures()
    topology = initialize(config.parallel, seed=config.seed)
    watch_hosts(config.parallel.max_host_silence_s)
    run_dir = RunDir.of(config)
    tokenizer = load_tokenizer(config.model)
    hf_config = complete_hf_config(config.model, tokenizer)
    source: Path | None = None
    if config.model.path:
        source = local_directory(config.model.path, "model.path", topology.host_group)
    corrections = stored_corrections(hf_config, config.model, source)
    hf_config |= corrections.fields
    if topology.rank == 0:
        exported, notes = exported_config(hf_config, config.model)
        for note in (*corrections.notes, *notes):
            print(f"note: {note}", flush=True)
    stop_ids = stop_token_ids(config.model, tokenizer, source)
    if topology.rank == 0:
        if source is not None:
            check_weights(config.model, hf_config, source)
        create_run_dir(config, resume=resume)
        write_model_files(run_dir.model, config.model, exported, tokenizer, source, stop_ids)
        print(f"stop tokens: {describe_stop_tokens(stop_ids, tokenizer)}", flush=True)
    dist.barrier(group=topology.host_group)
    return topology, run_dir, tokenizer, hf_config, stop_ids


def build_policy(
    config: Config, hf_config: dict[str, Any], topology: Topology, **options: Any
) -> Policy:
    """The policy with its starting weights: a checkpoint's, or drawn from the run's seed.

    Args:
        options: of `Policy`, from `objective` on.
    """
    padded = padded_vocab_size(hf_config["vocab_size"], topology.tp_size)
    mapping = Mapping(family_for(hf_config), hf_config, padded, with_mtp=False)
    source: TensorSource | Path = RandomSource(mapping, config.seed)
    if config.model.init == "pretrained":
        directory = local_directory(config.model.path, "model.path", topology.host_group)
        source = directory
        if not is_checkpoint(directory):
            source = open_source(directory, hf_config, config.model.dtype)
    return Policy(
        mapping,
        source,
        topology,
        parallel=config.parallel,
        optimizer=config.optimizer,
        dtype=config.model.dtype,
        **options,
    )


def packing(
    parallel: ParallelConfig, topology: Topology, max_tokens: int, mapping: Mapping
) -> Packing:
    """How this rank packs sequences of a mapped model."""
    return Packing(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        max_tokens=max_tokens,
        alignment=parallel.sequence_alignment,
        num_microbatches_multiple=topology.pp_size if topology.vp_size > 1 else 1,
        attention_break_even=attention_break_even(mapping),
    )


def _layout(t: Topology) -> str:
    more = {"VPP": t.vp_size, "CP": t.cp_size, "EP": t.ep_size}
    sizes = {"TP": t.tp_size, "PP": t.pp_size, "DP": t.dp_size}
    sizes |= {name: size for name, size in more.items() if size > 1}
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def report(config: Config, policy: Policy, run_dir: RunDir, **more: str) -> None:
    """Say and record on what the run runs: layout, kernels, versions. Rank 0 only speaks."""
    topology = policy.topology
    if topology.rank:
        return
    kernels = policy.kernels() | more
    environment = collect_environment(kernels, world_size=topology.world_size)
    create_run_dir(config, resume=True, environment=environment)
    print(
        f"layout: {_layout(topology)}\n"
        f"kernels: {', '.join(f'{name} {value}' for name, value in kernels.items())}\n"
        f"run directory: {run_dir.path}",
        flush=True,
    )


def build_prompt_cursor(config: RunConfig, tokenizer: Any) -> PromptCursor:
    """The training prompts, dealt out from the start."""
    rows = load_rows(config.data, seed=config.seed)
    data, longest = config.data, config.data.max_prompt_tokens
    prompts = build_prompts(
        rows, tokenizer, data.template, longest, data.dataset, few_shot=data.few_shot
    )
    check_golds(prompts, setting="data.answer_key", value=data.answer_key)
    return PromptCursor(
        prompts, config.rollout.num_prompts_per_step, config.seed, config.data.shuffle
    )


def export_hf(policy: Policy, run_dir: RunDir, step: int, *, bucket_bytes: int) -> None:
    """An HF checkpoint `hf/step_*` that transformers and vLLM load; collective, rank 0 writes."""
    progress("the model for transformers and vLLM")
    directory = run_dir.hf(step)
    weights = policy.hf_weights(bucket_bytes=bucket_bytes)
    if policy.topology.rank == 0:
        if directory.exists():  # the same step of a run that was resumed at its end
            shutil.rmtree(directory)
        write_hf_checkpoint(directory, weights, copy_files=sorted(run_dir.model.iterdir()))
        print(f"model: {directory}", flush=True)
    else:
        for _ in weights:  # the gathering of shards needs every rank
            pass
    dist.barrier(group=policy.topology.host_group)
