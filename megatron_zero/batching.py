"""Samples -> optimizer steps -> packed microbatches. Masks and the denominator are made here, once.

The objective of one optimizer step over N responses is

    loss = 1 / denominator * sum_i sum_t loss_weight_it * loss_it

with, by `loss.length_normalizer`,

    constant   loss_weight 1                 denominator N * max_response_tokens   Dr. GRPO
    response   loss_weight 1 / |response_i|  denominator N                         GRPO
    tokens     loss_weight 1                 denominator sum_i |response_i|        DAPO
    none       loss_weight 1                 denominator N                         RLOO

(reference A5; DAPO: arXiv 2503.14476, equation 12). Every term is known before the first forward
pass, so the gradient is a plain sum over microbatches and data-parallel ranks, however the samples
are spread over them. A sample that is masked out counts in N, but its tokens do not count among the
tokens that `tokens` averages over.

Every rank builds the same plan from the same samples and keeps its own part.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch

from megatron_zero.checks import UserError, round_up
from megatron_zero.config import RunConfig
from megatron_zero.types import (
    GlobalBatch,
    Graded,
    Microbatch,
    Minibatch,
    RolloutGroup,
    TokenRows,
    TrainSample,
)

_INTEGERS = ("tokens", "labels", "position_ids")
_BOOLS = ("loss_mask", "is_token")
_FLOATS = ("loss_weights", "advantages", "rollout_logprobs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How samples are laid out: where this rank stands and what a microbatch may hold."""

    dp_rank: int
    dp_size: int
    max_tokens: int  # per microbatch
    alignment: int = 1  # sequences are padded to a multiple of it
    num_microbatches_multiple: int = 1  # interleaved pipelines take them in groups of PP
    attention_break_even: float = math.inf  # tokens at which attention is half of a token's cost

    def plan(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """See `pack`."""
        return pack(
            lengths,
            num_ranks=self.dp_size,
            max_tokens=self.max_tokens,
            multiple=self.num_microbatches_multiple,
            attention_break_even=self.attention_break_even,
        )


def build_samples(
    groups: Sequence[RolloutGroup],
    graded: Sequence[Sequence[Graded]],
    advantages: torch.Tensor,
    *,
    mask_truncated: bool = False,
) -> list[TrainSample]:
    """One sample per response, group by group; `advantages` is [P, G]."""
    assert len(groups) == len(graded) == advantages.size(0)
    return [
        TrainSample(
            token_ids=group.prompt.token_ids + response.token_ids,
            prompt_length=len(group.prompt.token_ids),
            rollout_logprobs=response.rollout_logprobs,
            advantage=advantage,
            masked=mask_truncated and response.truncated,
            engine_index=response.engine_index,
        )
        for group, row in zip(groups, advantages.tolist(), strict=True)
        for response, advantage in zip(group.responses, row, strict=True)
    ]


def step_denominator(
    samples: Sequence[TrainSample], *, length_normalizer: str, max_response_tokens: int
) -> float:
    """What one optimizer step's sum is divided by.

    Args:
        samples: of the step, on all ranks, skipped ones included: the denominator may not depend
            on which of them a pass is needed for.
    """
    if length_normalizer == "constant":
        return float(len(samples) * max_response_tokens)
    if length_normalizer == "tokens":
        return float(max(sum(s.response_length for s in samples if not s.masked), 1))
    return float(len(samples))  # masked samples count (reference A3.3)


def samples_to_train(
    samples: Sequence[TrainSample], *, min_samples: int, skip_zero_advantage: bool
) -> list[int]:
    """Indices of the samples a pass is needed for.

    Without a KL or entropy term the gradient of a sample with advantage 0 is exactly 0. One such
    sample of every engine is kept (the shortest), so that each step still compares every engine
    with the policy, and as many more as it takes to give each of `min_samples` ranks one.
    """
    if not skip_zero_advantage:
        return list(range(len(samples)))
    kept = {i for i, s in enumerate(samples) if s.advantage != 0 and not s.masked}
    by_length = sorted(range(len(samples)), key=lambda i: (len(samples[i].token_ids), i))
    seen = {samples[i].engine_index for i in kept}
    for i in by_length:
        if samples[i].engine_index not in seen:
            seen.add(samples[i].engine_index)
            kept.add(i)
    for i in by_length:
        if len(kept) >= min(min_samples, len(samples)):
            break
        kept.add(i)
    return sorted(kept)


def pack(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    max_tokens: int,
    multiple: int = 1,
    attention_break_even: float = math.inf,
) -> list[list[list[int]]]:
    """Spread sequences over ranks and microbatches: [rank][microbatch] -> indices.

    A token budget bounds a microbatch (memory), its cost is balanced (time): n tokens of one
    sequence cost n (1 + n / attention_break_even). Costliest first into the cheapest microbatch
    with room; then whole microbatches are dealt to the ranks. Every rank gets the same number of
    them, the smallest for which this fits and that is a multiple of `multiple`. Deterministic in
    `lengths`.

    Raises:
        ValueError: a sequence longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise UserError(
            f"batch.max_tokens_per_microbatch={max_tokens}: must hold a sample of {max(lengths)}"
        )
    costs = [length * (1 + length / attention_break_even) for length in lengths]
    per_rank = round_up(max(1, -(-sum(lengths) // (num_ranks * max_tokens))), multiple)
    while (bins := _fill(lengths, costs, num_ranks * per_rank, max_tokens)) is None:
        per_rank += multiple
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    bins.sort(key=lambda bin_: -sum(costs[i] for i in bin_))
    for start in range(0, len(bins), num_ranks):  # the costliest to the rank that has least
        by_load = sorted(range(num_ranks), key=loads.__getitem__)
        for rank, bin_ in zip(by_load, bins[start : start + num_ranks], strict=True):
            ranks[rank].append(bin_)
            loads[rank] += sum(costs[i] for i in bin_)
    return ranks


def _fill(
    lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> "list[list[int]] | None":
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, loads = [0] * num_bins, [0.0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        with_room = [b for b in range(num_bins) if tokens[b] + lengths[i] <= max_tokens]
        if not with_room:
            return None
        cheapest = min(with_room, key=loads.__getitem__)
        bins[cheapest].append(i)
        tokens[cheapest] += lengths[i]
        loads[cheapest] += costs[i]
    return bins


def build_microbatch(
    samples: Sequence[TrainSample],
    indices: Sequence[int],
    *,
    alignment: int = 1,
    length_normalizer: str = "constant",
) -> Microbatch:
    """Pack the samples at `indices` one after the other, shifted and masked; none: all padding."""
    names = (*_INTEGERS, *_BOOLS, *_FLOATS)
    columns: dict[str, list[float]] = {name: [] for name in names}
    cu_seqlens = [0]
    for i in indices:
        sample = samples[i]
        num_positions = len(sample.token_ids) - 1
        num_padding = round_up(num_positions, alignment) - num_positions
        # label t is token t + 1: the first response token is the label of the last prompt token
        num_prompt = sample.prompt_length - 1
        num_response = sample.response_length
        weight = 1.0 / max(num_response, 1) if length_normalizer == "response" else 1.0
        trained = 0.0 if sample.masked else 1.0
        before, after = [0.0] * num_prompt, [0.0] * num_padding
        columns["tokens"] += [*sample.token_ids[:-1], *[0] * num_padding]
        columns["labels"] += [*sample.token_ids[1:], *[0] * num_padding]
        columns["position_ids"] += range(num_positions + num_padding)
        columns["loss_mask"] += [*before, *[trained] * num_response, *after]
        columns["is_token"] += [*[1.0] * num_positions, *after]
        columns["loss_weights"] += [*before, *[trained * weight] * num_response, *after]
        columns["advantages"] += [*before, *[sample.advantage] * num_response, *after]
        columns["rollout_logprobs"] += [*before, *sample.rollout_logprobs, *after]
        cu_seqlens.append(len(columns["tokens"]))
    if not indices:  # every rank must run the same number of microbatches
        for values in columns.values():
            values += [0] * alignment
        cu_seqlens.append(alignment)
    return Microbatch(
        **{name: torch.tensor(columns[name], dtype=torch.int64) for name in _INTEGERS},
        **{name: torch.tensor(columns[name], dtype=torch.float32) for name in _FLOATS},
        **{name: torch.tensor(columns[name], dtype=torch.bool) for name in _BOOLS},
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in itertools.pairwise(cu_seqlens)),
        sample_index=tuple(indices),
    )


def token_rows(
    microbatch: Microbatch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    cp_group: Optional[torch.distributed.ProcessGroup] = None,
) -> TokenRows:
    """What the loss sees of a microbatch: its tokens under `loss_mask`.

    Args:
        logprobs, entropy: [R] of those tokens, with gradient.
        cp_group: of the ranks that each have an equal part of every sequence; None: one has all.
    """
    mask = microbatch.loss_mask
    old, ref = microbatch.old_logprobs, microbatch.ref_logprobs
    num_parts = 1 if cp_group is None else cp_group.size()
    lengths = microbatch.cu_seqlens.diff().long() // num_parts
    return TokenRows(
        logprobs=logprobs,
        entropy=entropy,
        loss_weights=microbatch.loss_weights[mask],
        advantages=microbatch.advantages[mask],
        rollout_logprobs=microbatch.rollout_logprobs[mask],
        old_logprobs=logprobs.detach() if old is None else old[mask],
        ref_logprobs=None if ref is None else ref[mask],
        cp_group=cp_group,
        response_lengths=torch.segment_reduce(mask.double(), "sum", lengths=lengths).long(),
    )


def build_global_batch(
    samples: Sequence[TrainSample], config: RunConfig, packing: Packing, *, step: int
) -> GlobalBatch:
    """Cut one rollout into optimizer steps and pack this rank's share of each.

    Samples are permuted with a seed of (run, step) before they are cut, as the reference permutes
    per epoch, so that a prompt's group is not one optimizer step's alone.

    Args:
        samples: all responses of the step, on every rank the same.
        config: the run's; its batch and loss sections decide.
        packing: this rank's place, and the token budget.
        step: of the loop.
    """
    size = config.batch.global_batch_size
    order = list(range(len(samples)))
    if config.num_optimizer_steps > 1:
        random.Random(f"{config.seed}/{step}/minibatches").shuffle(order)
    loss = config.loss
    has_other_terms = config.needs_ref_policy or max(loss.entropy_coef, loss.balance_coef) > 0
    exact_zero = config.batch.skip_zero_advantage and not has_other_terms
    minibatches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        kept = samples_to_train(
            [samples[i] for i in chosen],
            min_samples=packing.dp_size,
            skip_zero_advantage=exact_zero,
        )
        denominator = step_denominator(
            [samples[i] for i in chosen],
            length_normalizer=loss.length_normalizer,
            max_response_tokens=config.rollout.max_response_tokens,
        )
        needed = [chosen[i] for i in kept]
        own = _own_microbatches(samples, needed, packing, loss.length_normalizer)
        minibatches.append(
            Minibatch(microbatches=own, denominator=denominator, num_samples=len(chosen))
        )
    return GlobalBatch(minibatches=tuple(minibatches))


def _own_microbatches(
    samples: Sequence[TrainSample], indices: Sequence[int], packing: Packing, normalizer: str
) -> tuple[Microbatch, ...]:
    """This rank's share of the samples at `indices`, packed."""
    lengths = [round_up(len(samples[i].token_ids) - 1, packing.alignment) for i in indices]
    bins = ([indices[i] for i in bin_] for bin_ in packing.plan(lengths)[packing.dp_rank])
    options: dict[str, Any] = {"alignment": packing.alignment, "length_normalizer": normalizer}
    return tuple(build_microbatch(samples, bin_, **options) for bin_ in bins)


def sample_weights(batch: GlobalBatch) -> dict[int, float]:
    """How much each of this rank's samples weighs in the gradient, before the policy has a say.

    sum_t |advantage * loss_weight_it| / denominator, by index among the samples of the step. What
    is not in the batch, because its gradient is 0, is not in the answer.
    """
    weights = {}
    for minibatch in batch.minibatches:
        for microbatch in minibatch.microbatches:
            products = (microbatch.advantages * microbatch.loss_weights).abs().double()
            for i, tokens in microbatch.by_sample(products):
                weights[i] = tokens.sum().item() / minibatch.denominator
    return weights


def set_advantages(batch: GlobalBatch, advantages: torch.Tensor) -> GlobalBatch:
    """The same batch with other advantages, [N] over all samples of the step."""
    minibatches = []
    for minibatch in batch.minibatches:
        microbatches = []
        for microbatch in minibatch.microbatches:
            per_token = torch.zeros_like(microbatch.advantages)
            for i, part in microbatch.by_sample(per_token):
                part.fill_(advantages[i])
            microbatches.append(replace(microbatch, advantages=per_token))
        minibatches.append(replace(minibatch, microbatches=tuple(microbatches)))
    return GlobalBatch(minibatches=tuple(minibatches))


def build_pass(samples: Sequence[TrainSample], packing: Packing) -> Minibatch:
    """This rank's share of all samples, for a pass that only computes their logprobs."""
    return Minibatch(
        microbatches=_own_microbatches(samples, range(len(samples)), packing, "constant"),
        denominator=1.0,
        num_samples=len(samples),
    )


def build_document_minibatch(
    sequences: Sequence[Sequence[tuple[int, ...]]], packing: Packing
) -> Minibatch:
    """This rank's share of one next-token step: the loss is the mean over all tokens of the step.

    Args:
        sequences: of all ranks; each a list of documents, which do not attend to one another.
    """
    samples = [
        TrainSample(
            token_ids=document,
            prompt_length=1,
            rollout_logprobs=(0.0,) * (len(document) - 1),
            advantage=0.0,
        )
        for sequence in sequences
        for document in sequence
    ]
    return Minibatch(
        microbatches=_own_microbatches(samples, range(len(samples)), packing, "constant"),
        denominator=float(sum(len(s.token_ids) - 1 for s in samples)),
        num_samples=len(samples),
    )
