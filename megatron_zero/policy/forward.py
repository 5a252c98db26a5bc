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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_zero.batching import token_rows
from megatron_zero.losses import Objective, Sums
from megatron_zero.policy.attention import own_positions
from megatron_zero.policy.balance import PackedSequences
from megatron_zero.policy.parallel import Topology
from megatron_zero.types import Microbatch


def _packed_sequences(microbatch: Microbatch) -> PackedSequences:
    lengths = microbatch.cu_seqlens.diff().long()
    num_parts = int(microbatch.cu_seqlens[-1]) // len(microbatch.tokens)  # context parallelism
    numbers = torch.arange(len(lengths), device=lengths.device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
        sequence_index=numbers.repeat_interleave(lengths // num_parts),
        is_token=microbatch.is_token,
    )


def _call_model(model: torch.nn.Module, microbatch: Microbatch) -> torch.Tensor:
    return model(
        microbatch.tokens[None],
        microbatch.position_ids[None],
        None,
        labels=microbatch.labels[None],
        loss_mask=microbatch.loss_mask[None],
        packed_seq_params=_packed_sequences(microbatch),
    )


def _own_part(microbatch: Microbatch, topology: Topology) -> Microbatch:
    """What this context-parallel rank computes; `cu_seqlens` stays that of whole sequences."""
    if topology.cp_size == 1:
        return microbatch
    own = own_positions(microbatch.cu_seqlens, topology.cp_rank, topology.cp_size)
    return microbatch.with_tensors(lambda x: x if x is microbatch.cu_seqlens else x[own])


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
        loss, sums, maxima = objective(token_rows(microbatch, logprobs, entropy, cp_group))
        loss = loss / denominator
        # The schedule works on the loss in place, so what is reported is a copy.
        return loss, (loss.detach().clone(), sums, maxima)

    cp_group = topology.cp_group if topology.cp_size > 1 else None
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
