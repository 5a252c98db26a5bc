"""Under torchrun: one step's gradients under objectives that look at whole responses.

objectives_worker.py DIRECTORY CASE...       CASE: objective:layout, see tests/layouts.py
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_zero.batching import build_global_batch
from megatron_zero.build import packing
from megatron_zero.config import LossConfig
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.losses import policy_objective
from megatron_zero.policy import hf_weights
from megatron_zero.policy.parallel import initialize
from megatron_zero.types import Microbatch
from tests import tiny
from tests.invariance.gradient_worker import build
from tests.layouts import Case, parse

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


def one_step(name: str, case: Case) -> dict:
    topology = initialize(case.parallel, seed=0)
    policy = build(
        case.parallel,
        topology,
        hf_config=tiny.hf_config(tied=False),
        make_source=lambda mapping: RandomSource(mapping, 0),
        objective=policy_objective(OBJECTIVES[name]),
    )
    packed = packing(case.parallel, topology, case.max_tokens, policy.mapping)
    config = tiny.run_config(max_tokens=case.max_tokens, loss=OBJECTIVES[name])
    batch = build_global_batch(tiny.samples(), config, packed, step=0)
    (minibatch,) = policy.with_old_logprobs(batch).minibatches
    microbatches = tuple(map(moved, minibatch.microbatches))
    minibatch = dataclasses.replace(minibatch, microbatches=microbatches)
    values = policy.forward_backward(minibatch).values
    gradients = hf_weights.export(
        policy.chunks,
        policy.mapping,
        topology,
        bucket_bytes=30_000,
        value=lambda param: param.main_grad,
    )
    return {"metrics": values, "gradients": {n: tensor.clone() for n, tensor in gradients}}


def main() -> None:
    directory, cases = Path(sys.argv[1]), sys.argv[2:]
    for text in cases:
        name, layout = text.split(":")
        result = one_step(name, parse(layout))
        if dist.get_rank() == 0:
            torch.save(result, directory / f"{text}-{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
