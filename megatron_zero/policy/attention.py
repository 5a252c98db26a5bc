"""Core attention and norm of the local layer spec: packed sequences with torch's own attention.

Megatron's local `DotProductAttention` refuses packed sequences; Transformer Engine's takes them,
but needs CUDA. Sequences of like length are attended to together: each bucket is one
`scaled_dot_product_attention` call on a padded block. Padding is only at the end of a sequence,
where causal attention never looks, so no mask is needed and no sequence sees another.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

MAX_PADDING = 0.25  # of a bucket's block; more buckets cost more calls, fewer more padding


@functools.lru_cache(maxsize=64)
def attention_buckets(
    cu_seqlens: tuple[int, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor, int], ...]:
    """Which packed positions are attended to together.

    Args:
        cu_seqlens: S + 1 sequence boundaries in the packed tokens.

    Returns:
        Per bucket: positions to read, [B * L], with the block's padding pointing at the sequence's
        first token; which of the block's cells are real, [N]; and L. Together the real cells
        are every packed position exactly once, in the order of `torch.cat` over buckets.
    """
    starts = list(cu_seqlens[:-1])
    lengths = [end - start for start, end in zip(starts, cu_seqlens[1:], strict=True)]
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    buckets: list[list[int]] = []
    for s in order:
        if not lengths[s]:
            continue
        if buckets and lengths[s] >= (1 - MAX_PADDING) * lengths[buckets[-1][0]]:
            buckets[-1].append(s)
        else:
            buckets.append([s])
    plan = []
    for bucket in buckets:
        longest = lengths[bucket[0]]
        offset = torch.arange(longest)
        start = torch.tensor([starts[s] for s in bucket])[:, None]
        length = torch.tensor([lengths[s] for s in bucket])[:, None]
        real = offset < length
        read = torch.where(real, start + offset, start)
        plan.append((read.flatten(), real.flatten().nonzero().squeeze(1), longest))
    return tuple(plan)


@functools.lru_cache(maxsize=64)
def _inverse_order(cu_seqlens: tuple[int, ...]) -> torch.Tensor:
    """[T]: where each packed position stands in the concatenated outputs of the buckets."""
    written = torch.cat([read[real] for read, real, _ in attention_buckets(cu_seqlens)])
    inverse = torch.empty_like(written)
    inverse[written] = torch.arange(len(written))
    return inverse


def own_positions(cu_seqlens: torch.Tensor, cp_rank: int, cp_size: int) -> torch.Tensor:
    """[T / cp_size] packed positions of one context-parallel rank.

    Each sequence is cut into 2 * cp_size equal chunks, of which rank r has r and its mirror image:
    Megatron's load balancing for causal attention (upstream symbol: get_batch_on_this_cp_rank).

    Example: a sequence of 8, cp_size 2: rank 0 has 0, 1, 6, 7 and rank 1 has 2, 3, 4, 5.
    """
    positions = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        chunks = torch.arange(start, end).view(2 * cp_size, -1)
        positions += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]]
    return torch.cat(positions).to(cu_seqlens.device)


class PackedAttention(MegatronModule):
    """Causal self-attention over packed sequences (thd); grouped-query heads are not repeated."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        softmax_scale: Optional[float] = None,
        pg_collection: Any = None,
        **others: Any,  # what Megatron tells every attention, and this one need not know
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *masks: Any,
        packed_seq_params: Optional[PackedSeqParams] = None,
        **others: Any,
    ) -> torch.Tensor:
        """query [T, heads, d], key [T, kv_heads, d], value [T, kv_heads, v] -> [T, heads * v]."""
        assert packed_seq_params is not None, "the policy always packs"
        cu_seqlens = tuple(packed_seq_params.cu_seqlens_q.tolist())
        if self.cp_group is not None:
            return self._context_parallel(query, key, value, cu_seqlens)
        inputs, outputs = (query, key, value), []
        for read, real, longest in attention_buckets(cu_seqlens):
            read, real = read.to(query.device), real.to(query.device)
            parts = (x.index_select(0, read).view(-1, longest, *x.shape[1:]) for x in inputs)
            outputs.append(self._attend(*parts, is_causal=True).index_select(0, real))
        inverse = _inverse_order(cu_seqlens).to(query.device)
        return torch.cat(outputs).index_select(0, inverse)

    def _attend(self, *inputs: torch.Tensor, **mask: Any) -> torch.Tensor:
        """Blocks [B, L, heads, d] of query, key, value -> [B * L, heads * v]."""
        query, key, value = (x.transpose(1, 2) for x in inputs)
        gqa = query.size(1) != key.size(1)
        block = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=self.softmax_scale, enable_gqa=gqa, **mask
        )
        return block.transpose(1, 2).flatten(2).flatten(0, 1)

    def _context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: Sequence[int]
    ) -> torch.Tensor:
        """The same with this rank's part of the queries, [T / cp, heads, d]; keys are gathered."""
        assert self.cp_group is not None
        rank, size = self.cp_group.rank(), self.cp_group.size()
        bounds = torch.tensor(cu_seqlens)
        order = torch.cat([own_positions(bounds, r, size) for r in range(size)]).argsort()
        key, value = (
            # forward: all ranks' keys; backward: the sum of the gradients that each rank has
            gather_from_sequence_parallel_region(
                x.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
            ).index_select(0, order)
            for x in (key, value)
        )
        own = own_positions(bounds, rank, size)
        outputs = []
        for start, end in itertools.pairwise(cu_seqlens):
            first, last = start // size, end // size
            visible = own[first:last, None] >= torch.arange(start, end)
            parts = (x[None] for x in (query[first:last], key[start:end], value[start:end]))
            outputs.append(self._attend(*parts, attn_mask=visible))
        return torch.cat(outputs)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` in the model's dtype, also under sequence parallelism.

    Megatron's local spec offers torch's class as it is, which keeps float32 weights in a bf16
    model and refuses sequence parallelism; its gradients are summed over TP by the mark set here.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
