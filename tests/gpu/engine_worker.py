"""Under torchrun, one process: engine and policy in bf16 on one GPU, asleep and awake by turns.

engine_worker.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.config import ParallelConfig, RolloutConfig
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.policy.parallel import initialize
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.weight_sync.colocated import ColocatedWeightSync
from tests import tiny
from tests.distributed.engine_worker import SETTINGS, STOP_IDS, mismatch, model_files
from tests.invariance.gradient_worker import build


def used_gib() -> float:
    """Of the device's memory, by all of its processes, caches given back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def main() -> None:
    layout = ParallelConfig()
    topology = initialize(layout, seed=0)
    policy = build(
        layout,
        topology,
        hf_config=tiny.hf_config(tied=False),
        make_source=lambda mapping: RandomSource(mapping, 0),
        temperature=SETTINGS.temperature,
        dtype="bf16",
    )
    memory = {"policy": used_gib()}
    state_gib = sum(t.numel() * 16 for chunk in policy.chunks for t in chunk.parameters()) / 2**30
    engine = VllmEngine(
        files := model_files(tiny.hf_config(tied=False)),
        RolloutConfig(gpu_memory_utilization=0.2, enforce_eager=True),
        tokenizer=files,
        stop_token_ids=STOP_IDS,
        dtype="bf16",
        max_model_len=128,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    sampler = Sampler(engine, topology.host_group)
    sync = ColocatedWeightSync(engine, policy.mapping.hf_names(), topology.host_group)
    sampled = []
    for version in (1, 2, 3):
        sync.push(policy.hf_weights(bucket_bytes=20_000), version)
        memory[f"awake {version}"] = used_gib()
        sampled.append(mismatch(policy, engine, sampler, topology, version))
        engine.sleep()
        memory[f"asleep {version}"] = used_gib()
        policy.offload()
        memory[f"offloaded {version}"] = used_gib()
        policy.onload()
        policy.optimizer_step()
    results = {
        "memory": memory,
        "state_gib": state_gib,
        "sampled": sampled,
        "total_gib": torch.cuda.mem_get_info()[1] / 2**30,
    }
    Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
