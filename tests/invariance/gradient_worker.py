"""Under torchrun: one step's loss and gradients in several layouts of one world, written to files.

gradient_worker.py OUT_DIR LAYOUT...       LAYOUT: tp.pp.sp.max_tokens.tied, as in 2.1.1.100.0
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.batching import Packing, build_global_batch
from megatron_zero.config import OptimizerConfig, ParallelConfig
from megatron_zero.convert.families import family_for
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.policy.parallel import Topology, initialize
from tests import tiny


def build(layout: ParallelConfig, topology: Topology, *, tied: bool, objective=None, **more):
    """A policy of the tiny model with seeded weights."""
    from megatron_zero.policy.forward import policy_objective
    from megatron_zero.policy.model import padded_vocab_size
    from megatron_zero.policy.policy import Policy

    hf_config = tiny.hf_config(tied=tied)
    mapping = Mapping(family_for(hf_config), hf_config, padded_vocab_size(131, topology.tp_size))
    options = {
        "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.2),
        "dtype": "fp32",
        "num_optimizer_steps": 4,
        **more,
    }
    return Policy(
        mapping,
        RandomSource(mapping, 0),
        topology,
        parallel=layout,
        objective=objective or policy_objective(tiny.run_config().loss),
        **options,
    )


def one_step(layout: ParallelConfig, *, max_tokens: int, tied: bool) -> dict:
    from megatron_zero.policy import hf_weights

    topology = initialize(layout, seed=0)
    policy = build(layout, topology, tied=tied, with_ref_policy=True)
    packing = Packing(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        max_tokens=max_tokens,
        alignment=topology.tp_size if layout.sequence_parallel else 1,
    )
    config = tiny.run_config(max_tokens=max_tokens)
    batch = build_global_batch(tiny.samples(), config, packing, step=0)
    (minibatch,) = policy.with_old_logprobs(batch).minibatches
    # old logprobs a little off, so that ratios differ from 1 and some are clipped
    minibatch = dataclasses.replace(
        minibatch,
        microbatches=tuple(
            dataclasses.replace(m, old_logprobs=m.old_logprobs + 0.3 * torch.sin(m.labels.float()))
            for m in minibatch.microbatches
        ),
    )
    values = policy.forward_backward(minibatch).values
    gradients = {
        name: tensor.clone()
        for name, tensor in hf_weights.export(
            policy.model,
            policy.mapping,
            topology,
            bucket_bytes=30_000,
            value=lambda param: param.main_grad,
        )
    }
    values |= policy.optimizer_step().values
    weights = {n: t.clone() for n, t in policy.hf_weights(bucket_bytes=30_000)}
    # the policy has moved away from the reference: what KL-in-reward would subtract
    moved = policy.with_ref_logprobs(policy.with_old_logprobs(batch))
    kl = policy.kl_to_ref(moved, num_samples=tiny.NUM_SAMPLES)
    return {"metrics": values, "gradients": gradients, "weights": weights, "kl_to_ref": kl}


def main() -> None:
    out, *layouts = sys.argv[1:]
    for text in layouts:
        tp, pp, sp, max_tokens, tied = map(int, text.split("."))
        layout = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=bool(sp),
            # gradients stay whole on every rank, so that they can be looked at
            use_distributed_optimizer=False,
        )
        result = one_step(layout, max_tokens=max_tokens, tied=bool(tied))
        if dist.get_rank() == 0:
            torch.save(result, Path(out) / f"{text}.{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
