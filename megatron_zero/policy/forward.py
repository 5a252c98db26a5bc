"""The forward step for Megatron's schedules; the only file that knows how a loss is scaled.

The sum contract. A microbatch's loss arrives here as a plain sum over its tokens and leaves divided
by the optimizer step's denominator, which is known beforehand and the same on every rank. From
there on nothing may be divided again:

* `TransformerConfig.calculate_per_token_loss=True` and a 3-tuple `(loss, num_tokens, data)` make
  `schedules.forward_step_calc_loss` neither divide by the number of microbatches nor multiply by
  the context-parallel size;
* `num_tokens` is 0, so `finalize_model_grads` has nothing to divide the gradients by;
* with that flag `DistributedDataParallel` sums over data parallel x context parallel, where it
  would average otherwise (`gradient_scaling_factor` 1).

So the gradient is the sum over microbatches and ranks, whatever the layout: `tests/invariance`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_zero.config import LossConfig
from megatron_zero.losses import (
    clip_fraction_terms,
    clipped_policy_loss,
    kl_estimate,
    truncated_importance_weights,
)
from megatron_zero.policy.attention import own_positions
from megatron_zero.policy.parallel import Topology
from megatron_zero.types import Microbatch

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """The R tokens of a microbatch that the loss sees, in packed order; all [R]."""

    logprobs: torch.Tensor  # with gradient
    entropy: torch.Tensor  # with gradient
    loss_weights: torch.Tensor
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: Optional[torch.Tensor]


# rows -> (loss summed over the rows, not yet divided; values to sum; values to take the maximum of)
Objective = Callable[[TokenRows], tuple[torch.Tensor, Sums, Sums]]


def policy_objective(loss: LossConfig) -> Objective:
    """The clipped surrogate with its optional KL term and importance correction."""

    def objective(rows: TokenRows) -> tuple[torch.Tensor, Sums, Sums]:
        clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
        per_token = clipped_policy_loss(rows.logprobs, rows.old_logprobs, rows.advantages, **clip)
        if loss.importance_cap > 0:
            per_token = per_token * truncated_importance_weights(
                rows.old_logprobs, rows.rollout_logprobs, cap=loss.importance_cap
            )
        sums: Sums = {}
        if rows.ref_logprobs is not None:
            kl = kl_estimate(rows.logprobs, rows.ref_logprobs, kind=loss.kl_kind)
            sums["kl_ref"] = kl.detach().sum()
            if loss.kl_coef > 0:
                per_token = per_token + loss.kl_coef * kl
        with torch.no_grad():
            mismatch = rows.old_logprobs - rows.rollout_logprobs
            sums |= {
                "tokens": torch.tensor(float(len(mismatch)), device=mismatch.device),
                "entropy": rows.entropy.sum(),
                "clipped": clip_fraction_terms(
                    rows.logprobs, rows.old_logprobs, rows.advantages, **clip
                ).sum(),
                "mismatch_kl": kl_estimate(rows.rollout_logprobs, rows.old_logprobs).sum(),
                "mismatch_abs": mismatch.abs().sum(),
            }
            maxima = {"mismatch_max": mismatch.abs().amax() if len(mismatch) else sums["entropy"]}
        return (rows.loss_weights * per_token).sum(), sums, maxima

    return objective


def next_token_objective(rows: TokenRows) -> tuple[torch.Tensor, Sums, Sums]:
    """Cross-entropy, summed: what pretraining minimises."""
    tokens = torch.tensor(float(len(rows.logprobs)), device=rows.logprobs.device)
    sums = {"tokens": tokens, "entropy": rows.entropy.detach().sum()}
    return -(rows.loss_weights * rows.logprobs).sum(), sums, {}


def _packed_seq_params(microbatch: Microbatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
    )


def _call_model(model: torch.nn.Module, microbatch: Microbatch) -> torch.Tensor:
    return model(
        microbatch.tokens[None],
        microbatch.position_ids[None],
        None,
        labels=microbatch.labels[None],
        loss_mask=microbatch.loss_mask[None],
        packed_seq_params=_packed_seq_params(microbatch),
    )


def _own_part(microbatch: Microbatch, topology: Topology) -> Microbatch:
    """What this context-parallel rank computes; `cu_seqlens` stays that of whole sequences."""
    if topology.cp_size == 1:
        return microbatch
    own = own_positions(microbatch.cu_seqlens, topology.cp_rank, topology.cp_size)
    length = len(microbatch.tokens)
    cut = {
        field.name: value[own]
        for field in dataclasses.fields(microbatch)
        if field.name != "cu_seqlens"
        and isinstance(value := getattr(microbatch, field.name), torch.Tensor)
        and len(value) == length
    }
    return dataclasses.replace(microbatch, **cut)


def _run_schedule(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    loss_function: Callable[[Microbatch, torch.Tensor], tuple[torch.Tensor, Any]],
    *,
    forward_only: bool,
) -> list[Any]:
    """Every microbatch through the pipeline; the last stage returns what the loss function said."""

    def forward_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Any, Any]:
        microbatch = next(data)

        def finish(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            loss, report = loss_function(microbatch, output)
            no_tokens = torch.tensor(0, dtype=torch.int, device=output.device)
            return loss, no_tokens, report

        return _call_model(model, microbatch), finish

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=max(len(m.tokens) for m in microbatches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    objective: Objective,
    topology: Topology,
    *,
    denominator: float,
) -> list[tuple[torch.Tensor, Sums, Sums]]:
    """Gradients of one optimizer step, left summed over ranks in the model's buffers.

    Args:
        chunks: this rank's DDP-wrapped stage.
        microbatches: on `topology.device`; the same number on every rank of the pipeline.
        objective: turns rows of tokens into a summed loss.
        denominator: of the whole optimizer step.

    Returns:
        On the last stage, per microbatch: loss / denominator, detached, and the objective's values.
    """

    def loss_function(microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logprobs, entropy = output
        mask = microbatch.loss_mask
        old, ref = microbatch.old_logprobs, microbatch.ref_logprobs
        rows = TokenRows(
            logprobs=logprobs,
            entropy=entropy,
            loss_weights=microbatch.loss_weights[mask],
            advantages=microbatch.advantages[mask],
            rollout_logprobs=microbatch.rollout_logprobs[mask],
            old_logprobs=logprobs.detach() if old is None else old[mask],
            ref_logprobs=None if ref is None else ref[mask],
        )
        loss, sums, maxima = objective(rows)
        loss = loss / denominator
        # The schedule works on the loss in place, so what is reported is a copy.
        return loss, (loss.detach().clone(), sums, maxima)

    own = [_own_part(microbatch, topology) for microbatch in microbatches]
    return _run_schedule(chunks, own, loss_function, forward_only=False)


def forward_logprobs(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], topology: Topology
) -> list[torch.Tensor]:
    """On the last stage, per microbatch: [T] logprobs of the labels, 0 outside `loss_mask`."""

    def loss_function(microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logprobs = torch.zeros(microbatch.loss_mask.shape, dtype=output.dtype, device=output.device)
        logprobs[microbatch.loss_mask] = output[0]
        return output.sum(), logprobs

    own = [_own_part(microbatch, topology) for microbatch in microbatches]
    with torch.no_grad():
        logprobs = _run_schedule(chunks, own, loss_function, forward_only=True)
    if topology.cp_size == 1 or not topology.is_last_stage:
        return logprobs
    return [_whole(part, m, topology) for part, m in zip(logprobs, microbatches, strict=True)]


def _whole(part: torch.Tensor, microbatch: Microbatch, topology: Topology) -> torch.Tensor:
    """[T] values of all context-parallel ranks from each one's own."""
    whole = part.new_zeros(len(microbatch.tokens))
    whole[own_positions(microbatch.cu_seqlens, topology.cp_rank, topology.cp_size)] = part
    dist.all_reduce(whole, group=topology.cp_group)
    return whole
