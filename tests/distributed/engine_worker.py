"""Under torchrun with 2 ranks: policies in several layouts against one vLLM engine setting.

    engine_worker.py ENGINE_TP OUT.json [tied] [yarn]

For each policy layout: push the weights, sample, and compare the engine's logprobs of its own
samples with the policy's; then change every weight, push again and compare again.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zero import first_sync
from megatron_zero.batching import Packing, build_global_batch, build_samples
from megatron_zero.config import MAX_FIRST_KL, ModelConfig, ParallelConfig, RolloutConfig
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.data.stop_tokens import stop_token_ids
from megatron_zero.determinism import sample_seed
from megatron_zero.model_files import write_model_files
from megatron_zero.policy.parallel import initialize
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import Graded, Prompt
from megatron_zero.weight_sync.colocated import ColocatedWeightSync
from tests import families, tiny
from tests.invariance.gradient_worker import build

LAYOUTS = {"tp2": (2, 1, False), "tp2 sp": (2, 1, True), "pp2": (1, 2, False), "dp2": (1, 1, False)}
SETTINGS = SamplingSettings(max_tokens=tiny.MAX_RESPONSE, temperature=0.8)
PROMPTS = [
    Prompt(index=i, text="", token_ids=tuple(range(3 + i, 8 + 2 * i)), answers=("",))
    for i in range(8)
]


STOP_IDS = (1, 50, 60, 70, 80)  # the tokenizer's EOS, and what generation_config.json adds


def model_config(options: list[str]) -> dict[str, Any]:
    """Tied or not; with `yarn` responses go beyond the original length of 16 positions."""
    config = tiny.hf_config(tied="tied" in options)
    if "yarn" in options:
        stretched = families.STRETCHED["qwen3_yarn"][1]
        for name in ("rope_parameters", "max_position_embeddings"):
            config[name] = stretched[name]
    return config


def model_files(hf_config: dict[str, Any]) -> str:
    """Config and tokenizer in a folder of this rank's own, made as by a run.

    The tokenizer is given apart from the model's folder, as with `model.tokenizer`.
    """
    source, directory = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    config, tokenizer = hf_config | {"eos_token_id": 1}, build_character_tokenizer()
    (source / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [*STOP_IDS[1:]]}))
    model = ModelConfig(path=str(source), tokenizer=str(source), dtype="fp32")
    assert stop_token_ids(model, tokenizer, source) == STOP_IDS
    write_model_files(directory, model, config, tokenizer, source, STOP_IDS)
    return str(directory)


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
    responses = [response for group in groups for response in group.responses]
    return {
        "max_abs": values["mismatch/max_abs"],
        "kl": values["mismatch/kl"],
        "tokens": [list(response.token_ids) for response in responses],
        "truncated": [response.truncated for response in responses],
    }


def kernel_takes(call: Callable[[], None]) -> bool:
    """Whether one of vLLM's kernels is built for what it is called with."""
    try:
        call()
    except RuntimeError as error:
        assert "nsupported" in str(error), error
        return False
    return True


def attend(size: int, dtype: torch.dtype) -> None:
    """Store one token's key and value with vLLM's CPU attention and attend to it."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache = torch.zeros(1, 1, 256, size, dtype=dtype).chunk(2, dim=2)
    token, isa = torch.zeros(1, 1, size, dtype=dtype), _get_attn_isa(dtype, 128, size)
    ops.cpu_attn_reshape_and_cache(token, token, *cache, torch.tensor([0]), isa)
    block, start, length = (
        torch.tensor(value, dtype=torch.int32) for value in ([[0]], [0, 1], [1])
    )
    plan = ops.cpu_attn_get_scheduler_metadata(
        1, 1, 1, size, length, dtype, start, True, -1, isa, True
    )
    ops.cpu_attention_with_kv_cache(
        query=token,
        key_cache=cache[0],
        value_cache=cache[1],
        output=torch.zeros_like(token),
        query_start_loc=start,
        seq_lens=length,
        scale=1.0,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=block,
        softcap=0,
        scheduler_metadata=plan,
        s_aux=None,
    )


def head_dims_of_the_kernels() -> list[int]:
    """Sizes of heads that vLLM's CPU attention takes."""
    found = []
    for size in range(8, 577, 8):
        taken = [kernel_takes(lambda: attend(size, t)) for t in (torch.float32, torch.bfloat16)]  # noqa: B023
        assert taken[0] == taken[1]
        if taken[0]:
            found.append(size)
    return found


def latent_sizes_of_the_kernels() -> list[list[int]]:
    """Rank and rotary size for which there is a decoding kernel."""
    from vllm import _custom_ops as ops

    block, length = (torch.tensor(value, dtype=torch.int32) for value in ([[0]], [1]))
    found = []
    for rank in range(64, 577, 32):
        for rope in range(0, 129, 16):
            query, cache = torch.zeros(1, 1, rank + rope), torch.zeros(1, 16, rank + rope)
            out = torch.zeros(1, 1, rank)
            call = functools.partial(
                ops.mla_decode_kvcache_cpu, out, query, cache, 1.0, block, length
            )
            if kernel_takes(call):
                found.append([rank, rope])
    return found


def main() -> None:
    engine_tp, out, hf_config = int(sys.argv[1]), sys.argv[2], model_config(sys.argv[3:])
    topology = initialize(ParallelConfig(), seed=0)
    engine = VllmEngine(
        files := model_files(hf_config),
        RolloutConfig(tensor_model_parallel_size=engine_tp, kv_cache_gib=0.05),
        tokenizer=files,
        stop_token_ids=STOP_IDS,
        dtype="fp32",
        max_model_len=128,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    results: dict[str, object] = {
        "head_dims": head_dims_of_the_kernels(),
        "latent sizes": latent_sizes_of_the_kernels(),
    }
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
            hf_config=hf_config,
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
