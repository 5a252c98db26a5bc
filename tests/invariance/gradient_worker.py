"""Under torchrun: one step's loss and gradients in several layouts of one world, written to files.

gradient_worker.py DIRECTORY CASE...       CASE: see tests/layouts.py

Weights are those of the checkpoint DIRECTORY/FAMILY.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zero.batching import build_global_batch
from megatron_zero.build import packing
from megatron_zero.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.safetensors_io import SafetensorsSource
from megatron_zero.convert.sources import TensorSource
from megatron_zero.hf_config import read_hf_config
from megatron_zero.policy.parallel import Topology, initialize
from megatron_zero.types import Minibatch
from tests import tiny
from tests.layouts import Case, parse


def build(
    layout: ParallelConfig,
    topology: Topology,
    *,
    hf_config: dict[str, Any],
    make_source: Callable[[Mapping], TensorSource],
    objective=None,
    **more,
):
    """A policy of a model with a vocabulary of 131."""
    from megatron_zero.losses import policy_objective
    from megatron_zero.policy.model import padded_vocab_size
    from megatron_zero.policy.policy import Policy

    mapping = mapping_for(hf_config, padded_vocab_size(131, topology.tp_size))
    options = {
        "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.2),
        "dtype": "fp32",
        "num_optimizer_steps": 4,
        **more,
    }
    return Policy(
        mapping,
        make_source(mapping),
        topology,
        parallel=layout,
        objective=objective or policy_objective(tiny.run_config().loss),
        **options,
    )


def some_steps(case: Case, checkpoint: Path) -> dict:
    """Loss and gradients of one step, then the weights after three."""
    from megatron_zero.policy import hf_weights

    topology = initialize(case.parallel, seed=0)
    policy = build(
        case.parallel,
        topology,
        hf_config=read_hf_config(ModelConfig(path=str(checkpoint))),
        make_source=lambda mapping: SafetensorsSource(checkpoint),
        dtype=case.dtype,
        # Megatron's clipping takes float32 gradients alone
        optimizer=OptimizerConfig(
            lr=1e-3, weight_decay=0.1, clip_grad=0.0 if case.dtype == "fp64" else 0.2
        ),
        with_ref_policy=True,
        balance_coef=case.balance_coef,
    )
    packed = packing(case.parallel, topology, case.max_tokens, policy.mapping)
    config, device = tiny.run_config(max_tokens=case.max_tokens), topology.device
    samples = tiny.samples(case.samples)
    batch = build_global_batch(samples, config, packed, step=0)
    (minibatch,) = policy.with_old_logprobs(batch).minibatches
    first = dataclasses.replace(samples[0], token_ids=tuple(130 - t for t in samples[0].token_ids))
    changed = build_global_batch([first, *samples[1:]], config, packed, step=0)
    neighbours = differences(minibatch, policy.with_old_logprobs(changed).minibatches[0])
    # old logprobs a little off, so that ratios differ from 1 and some are clipped
    minibatch = dataclasses.replace(
        minibatch,
        microbatches=tuple(
            dataclasses.replace(
                m, old_logprobs=m.old_logprobs + 0.3 * torch.sin(m.labels.float()).to(device)
            )
            for m in minibatch.microbatches
        ),
    )
    values = policy.forward_backward(minibatch).values
    gradients = {
        name: tensor.clone()
        for name, tensor in hf_weights.export(
            policy.chunks,
            policy.mapping,
            topology,
            bucket_bytes=30_000,
            # a router's bias is no parameter: it has none, and stays as it is
            value=lambda param: getattr(param, "main_grad", torch.zeros_like(param)),
        )
    }
    values |= policy.optimizer_step().values
    for _ in range(2):
        if dist.get_world_size() > 1:  # the reference stays as it is
            policy.offload()
            assert not any(
                chunk.buffers[0].grad_data.untyped_storage().size() for chunk in policy.ddp_chunks
            )
            policy.onload()
        policy.forward_backward(minibatch)
        policy.optimizer_step()
    weights = {n: t.clone() for n, t in policy.hf_weights(bucket_bytes=30_000)}
    # the policy has moved away from the reference: what KL-in-reward would subtract
    moved = policy.with_ref_logprobs(policy.with_old_logprobs(batch))
    return {
        "metrics": values,
        "gradients": gradients,
        "weights": weights,
        "kl_to_ref": policy.kl_to_ref(moved, num_samples=len(samples)),
        "neighbours": neighbours,
    }


def differences(one: Minibatch, other: Minibatch) -> list[float]:
    """Largest difference of the logprobs in sample 0, and in all others; over all ranks."""
    largest = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(one.microbatches, other.microbatches, strict=True):
        difference = (a.old_logprobs - b.old_logprobs).abs().double().cpu()
        for i, tokens in zip(
            a.sample_index, difference.split(a.cu_seqlens.diff().tolist()), strict=False
        ):
            largest[min(i, 1)] = max(largest[min(i, 1)], tokens.max())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def main() -> None:
    directory, cases = Path(sys.argv[1]), sys.argv[2:]
    for text in cases:
        case, start = parse(text), time.perf_counter()
        result = some_steps(case, directory / case.family)
        if dist.get_rank() == 0:
            print(f"{text}: {time.perf_counter() - start:.1f} s", flush=True)
            torch.save(result, directory / f"{text}-{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
