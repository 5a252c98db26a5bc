"""Under torchrun with 2 ranks: policies in several layouts against one vLLM engine setting.

    engine_worker.py ENGINE_TP OUT.json [tied]

For each policy layout: push the weights, sample, and compare the engine's logprobs of its own
samples with the policy's; then change every weight, push again and compare again.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero import first_sync
from megatron_zero.batching import Packing, build_global_batch, build_samples
from megatron_zero.config import MAX_FIRST_KL, ParallelConfig, RolloutConfig
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.determinism import sample_seed
from megatron_zero.policy.parallel import initialize
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import Graded, Prompt
from megatron_zero.weight_sync.colocated import ColocatedWeightSync
from tests import tiny
from tests.invariance.gradient_worker import build

LAYOUTS = {"tp2": (2, 1, False), "tp2 sp": (2, 1, True), "pp2": (1, 2, False), "dp2": (1, 1, False)}
SETTINGS = SamplingSettings(max_tokens=tiny.MAX_RESPONSE, temperature=0.8)
PROMPTS = [
    Prompt(index=i, text="", token_ids=tuple(range(3 + i, 8 + 2 * i)), answers=("",))
    for i in range(8)
]


def model_files(tied: bool) -> str:
    """Config and tokenizer, in a folder of this rank's own."""
    directory = tempfile.mkdtemp()
    config = tiny.hf_config(tied=tied) | {"eos_token_id": 1}
    (Path(directory) / "config.json").write_text(json.dumps(config))
    build_character_tokenizer().save_pretrained(directory)
    return directory


def packing_of(policy, topology) -> Packing:
    return Packing(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        max_tokens=200,
        alignment=topology.tp_size if policy.chunks[0].config.sequence_parallel else 1,
    )


def first_sync_says(policy, sampler, topology, version: int) -> str:
    """What a run would say of its first sync, or would stop with."""
    groups = first_sync.draw(sampler, PROMPTS, SETTINGS, version=version)
    logprobs = first_sync.policy_logprobs(policy, groups, packing_of(policy, topology))
    try:
        return first_sync.compare(groups, logprobs, max_kl=MAX_FIRST_KL["fp32"])
    except RuntimeError as error:
        return str(error)


def mismatch(policy, engine, sampler, topology, version: int) -> dict[str, object]:
    groups = sampler.sample(
        PROMPTS,
        SETTINGS,
        group_size=4,
        seed_of=lambda place, prompt, i: sample_seed(0, 0, place, prompt.index, i),
        policy_version=version,
    )
    verdict = Graded(reward=1.0, correct=True, formatted=True, outcome="correct")
    samples = build_samples(groups, [[verdict] * 4] * len(groups), torch.ones(len(groups), 4))
    batch = build_global_batch(samples, tiny.run_config(), packing_of(policy, topology), step=0)
    values = policy.forward_backward(batch.minibatches[0]).values
    tokens = [list(r.token_ids) for g in groups for r in g.responses]
    return {"max_abs": values["mismatch/max_abs"], "kl": values["mismatch/kl"], "tokens": tokens}


def main() -> None:
    engine_tp, out, tied = int(sys.argv[1]), sys.argv[2], "tied" in sys.argv[3:]
    topology = initialize(ParallelConfig(), seed=0)
    engine = VllmEngine(
        files := model_files(tied),
        RolloutConfig(tensor_model_parallel_size=engine_tp, kv_cache_gib=0.05),
        tokenizer=files,
        dtype="fp32",
        max_model_len=128,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    results: dict[str, object] = {}
    try:
        engine.generate([], SETTINGS)
    except RuntimeError as error:
        results["before the first push"] = str(error)
    for number, (name, (tp, pp, sp)) in enumerate(LAYOUTS.items()):
        layout = ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp
        )
        topology = initialize(layout, seed=0)
        policy = build(
            layout,
            topology,
            hf_config=tiny.hf_config(tied=tied),
            make_source=lambda mapping: RandomSource(mapping, 0),
            temperature=SETTINGS.temperature,
        )
        sampler = Sampler(engine, topology.host_group)
        sync = ColocatedWeightSync(engine, policy.mapping.hf_names(), topology.host_group)
        version = 10 * number
        sync.push(policy.hf_weights(bucket_bytes=20_000), version)
        results[f"{name} first"] = [first_sync_says(policy, sampler, topology, version)]
        results[name] = [mismatch(policy, engine, sampler, topology, version)]
        policy.optimizer_step()
        results[f"{name} first"].append(first_sync_says(policy, sampler, topology, version))
        # without a sync the engine must be on its own copy of the old weights
        results[f"{name} stale"] = mismatch(policy, engine, sampler, topology, version)["kl"]
        sync.push(policy.hf_weights(bucket_bytes=20_000), version + 1)
        results[name].append(mismatch(policy, engine, sampler, topology, version + 1))
        try:
            sampler.sample(
                PROMPTS, SETTINGS, group_size=1, seed_of=lambda *_: 0, policy_version=version
            )
        except RuntimeError as error:
            results[f"{name} wrong version"] = str(error)
    incomplete = [(n, t) for n, t in policy.hf_weights(bucket_bytes=20_000) if "norm" not in n]
    for label, tensors in {"incomplete": incomplete, "repeated": incomplete + incomplete}.items():
        try:
            sync.push(iter(tensors), 99)
        except RuntimeError as error:
            results[label] = str(error)
        results[f"{label} version"] = engine.weights_version
    if topology.rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
