"""Under torchrun: one step's gradients under objectives that look at whole responses.

objectives_worker.py DIRECTORY CASE...       CASE: objective.tp.pp.sp.max_tokens
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.batching import Packing, build_global_batch
from megatron_zero.config import LossConfig, ParallelConfig
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.losses import policy_objective
from megatron_zero.policy import hf_weights
from megatron_zero.policy.parallel import initialize
from megatron_zero.types import Microbatch
from tests import tiny
from tests.invariance.gradient_worker import build

OBJECTIVES = {
    "gspo": LossConfig(
        surrogate="gspo",
        length_normalizer="response",
        clip_low=0.01,
        clip_high=0.02,
        entropy_coef=0.02,
        importance_cap=1.2,
        importance_level="sequence",
        sequence_mask="product",
        sequence_mask_low=0.8,
        sequence_mask_high=1.5,
    ),
    "cispo": LossConfig(
        surrogate="cispo",
        length_normalizer="tokens",
        clip_low=0.1,
        clip_high=0.1,
        kl_coef=0.02,
        kl_kind="k2",
        importance_cap=1.02,
        sequence_mask="geometric",
        sequence_mask_low=0.995,
        sequence_mask_high=1.02,
    ),
}


def moved(m: Microbatch) -> Microbatch:
    """Old and engine's logprobs a little off the policy's, so that every bound acts on some."""
    labels = m.labels.float()
    old = m.old_logprobs + 0.2 * torch.sin(labels) * m.loss_mask
    ref = m.old_logprobs + 0.3 * torch.cos(2 * labels) * m.loss_mask
    engine = old + 0.1 * torch.sin(3 * labels) * m.loss_mask
    return dataclasses.replace(m, old_logprobs=old, ref_logprobs=ref, rollout_logprobs=engine)


def one_step(name: str, layout: ParallelConfig, *, max_tokens: int) -> dict:
    topology = initialize(layout, seed=0)
    policy = build(
        layout,
        topology,
        hf_config=tiny.hf_config(tied=False),
        make_source=lambda mapping: RandomSource(mapping, 0),
        objective=policy_objective(OBJECTIVES[name]),
    )
    packing = Packing(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        max_tokens=max_tokens,
        alignment=topology.tp_size if layout.sequence_parallel else 1,
    )
    config = tiny.run_config(max_tokens=max_tokens, loss=OBJECTIVES[name])
    batch = build_global_batch(tiny.samples(), config, packing, step=0)
    (minibatch,) = policy.with_old_logprobs(batch).minibatches
    microbatches = tuple(map(moved, minibatch.microbatches))
    minibatch = dataclasses.replace(minibatch, microbatches=microbatches)
    values = policy.forward_backward(minibatch).values
    weights = hf_weights.export(
        policy.model,
        policy.mapping,
        topology,
        bucket_bytes=30_000,
        value=lambda param: param.main_grad,
    )
    return {"metrics": values, "gradients": {name: tensor.clone() for name, tensor in weights}}


def main() -> None:
    directory, cases = Path(sys.argv[1]), sys.argv[2:]
    for text in cases:
        name, tp, pp, sp, max_tokens = text.split(".")
        layout = ParallelConfig(
            tensor_model_parallel_size=int(tp),
            pipeline_model_parallel_size=int(pp),
            sequence_parallel=bool(int(sp)),
            use_distributed_optimizer=False,  # gradients stay whole on every rank
        )
        result = one_step(name, layout, max_tokens=int(max_tokens))
        if dist.get_rank() == 0:
            torch.save(result, directory / f"{text}.{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
