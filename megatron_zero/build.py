"""From a configuration to the parts that the loops use: model files, policy, prompts."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_zero.batching import Packing
from megatron_zero.config import ModelConfig, ParallelConfig, RunConfig
from megatron_zero.config_io import Config
from megatron_zero.convert.cost import attention_break_even
from megatron_zero.convert.families import family_for
from megatron_zero.convert.fp8 import is_fp8_blocks
from megatron_zero.convert.hf_dir import carried_files, local_directory, open_source
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.convert.safetensors_io import write_hf_checkpoint
from megatron_zero.convert.sources import TensorSource
from megatron_zero.convert.stored import NUM_MTP, Corrections, folder_corrections
from megatron_zero.data.datasets import load_rows
from megatron_zero.data.encoding import load_tokenizer
from megatron_zero.data.prompts import PromptCursor, build_prompts
from megatron_zero.hf_config import DTYPES, read_hf_config, with_vocab_size
from megatron_zero.launch_args import progress
from megatron_zero.observability.environment import collect_environment
from megatron_zero.observability.run_dir import RunDir, create_run_dir
from megatron_zero.observability.watchdog import watch_hosts
from megatron_zero.policy.converted import is_megatron_checkpoint
from megatron_zero.policy.model import padded_vocab_size
from megatron_zero.policy.parallel import Topology, initialize
from megatron_zero.policy.policy import Policy

logger = logging.getLogger(__name__)


def complete_hf_config(model: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """The model's config with what only the tokenizer knows filled in."""
    hf_config = with_vocab_size(read_hf_config(model), len(tokenizer))
    if not model.path:
        hf_config |= {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
    family = family_for(hf_config)
    return {**family.defaults, **hf_config, "dtype": DTYPES[model.dtype]}


def stored_corrections(
    hf_config: dict[str, Any], model: ModelConfig, source: Path | None
) -> Corrections:
    """Where the weights that a run starts from are not the model of their config.

    Args:
        source: the folder of `model.path`.

    Raises:
        ValueError: the folder's files are damaged.
    """
    if source is None or model.init != "pretrained":
        return Corrections()
    return folder_corrections(hf_config, source)


def exported_config(
    hf_config: dict[str, Any], model: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """The config of what a run exports and its engine holds, and a sentence about each difference.

    Prediction layers are ignored by the policy, and 8-bit blocks dequantized when they are read.
    """
    exported, notes = dict(hf_config), []
    if exported.get(NUM_MTP):
        what = f"{NUM_MTP}={exported[NUM_MTP]}"
        notes.append(f"{model.path}: {what}: these layers are not trained, nor exported")
        exported[NUM_MTP] = 0
    if is_fp8_blocks(exported.get("quantization_config")):
        del exported["quantization_config"]
        notes.append(f"{model.path}: 8-bit blocks are trained, and exported, as {model.dtype}")
    return exported, notes


def write_model_files(
    directory: Path,
    model: ModelConfig,
    hf_config: dict[str, Any],
    tokenizer: Any,
    source: Path | None,
) -> None:
    """Config and tokenizer without weights: what the engine starts from and an export carries."""
    directory.mkdir(parents=True, exist_ok=True)
    if source is not None and not model.tokenizer:
        for path in carried_files(source):
            shutil.copy(path, directory)
    else:
        tokenizer.save_pretrained(directory)
    config_path = directory / "config.json"
    config_path.write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def start_run(config: Config, *, resume: bool) -> tuple[Topology, RunDir, Any, dict[str, Any]]:
    """Join the job, make the run directory and its model files; collective.

    Returns:
        Topology, run directory, tokenizer, and the completed HF config.

    Raises:
        ValueError: no such model or tokenizer, or the directory holds another run's results.
    """
    progress("joining the other processes; model files")
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
        create_run_dir(config, resume=resume)
        write_model_files(run_dir.model, config.model, exported, tokenizer, source)
    dist.barrier(group=topology.host_group)
    return topology, run_dir, tokenizer, hf_config


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
        if not is_megatron_checkpoint(directory):
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
    return PromptCursor(
        prompts, config.rollout.num_prompts_per_step, config.seed, config.data.shuffle
    )


def export_hf(policy: Policy, run_dir: RunDir, step: int, *, bucket_bytes: int) -> None:
    """An HF checkpoint `hf/step_*` that transformers and vLLM load; collective, rank 0 writes."""
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
