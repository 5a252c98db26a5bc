"""Load balancing of experts within each sequence, whatever is packed beside it.

For every mixture layer, with k experts chosen of E, and every sequence s with T_s tokens
(DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; f and P as in the Switch Transformer,
arXiv 2101.03961):

    coef / N · Σ_s Σ_i f_si P_si,   f_si = E / (k T_s) · tokens of s whose k best experts have i,
                                    P_si = mean over the tokens of s of i's share of the scores

N is the number of samples of the optimizer step, so the sum contract holds (`policy.forward`).
Megatron's own losses are means over what is packed in a microbatch, padding included, scaled by
this rank's tokens: another packing or layout is another loss. Here its routers call this instead
(upstream symbol: TopKRouter._apply_seq_aux_loss); the scores are Megatron's, float32 with softmax.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_zero.policy.parallel import Topology


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """What attention needs of a packed microbatch, and which sequence a position is of."""

    sequence_index: torch.Tensor  # [T / CP] of this context-parallel rank
    is_token: torch.Tensor  # [T / CP] bool: no padding


class SequenceBalance:
    """The balance term of a policy's mixture layers.

    `num_samples` is set before each optimizer step's passes.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], topology: Topology, *, coef: float
    ) -> None:
        self.topology, self.coef = topology, coef
        self.num_samples = 1
        self._sum = torch.zeros((), dtype=torch.float64, device=topology.device)
        for layer in (layer for chunk in chunks for layer in chunk.modules()):
            if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer):
                router = layer.mlp.router
                # of the layer: when it is recomputed it is given its microbatch again
                remember = functools.partial(self._remember, router)
                layer.register_forward_pre_hook(remember, with_kwargs=True)
                router.routing_type = "seq_aux_loss"
                router.config.moe_aux_loss_coeff = coef  # routers ask whether there is one
                router._apply_seq_aux_loss = functools.partial(self._attach, router)

    def _remember(self, router: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        packed = kwargs["packed_seq_params"]
        parts = torch.stack([packed.sequence_index, packed.is_token.long()])
        if router.config.sequence_parallel:
            parts = parts.chunk(self.topology.tp_size, dim=1)[self.topology.tp_rank]
        router.packed = (len(packed.cu_seqlens_q) - 1, *parts)

    def _attach(
        self,
        router: Any,
        probs: torch.Tensor,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        *shape: Any,
        **more: Any,
    ) -> torch.Tensor:
        """`probs`, with this rank's part of the term attached to its gradient."""
        num_sequences, index, is_token = router.packed
        ones = torch.ones_like(scores[:, :1])
        marks = torch.cat([chosen.to(scores.dtype), ones], dim=1) * is_token[:, None]
        counts = marks.new_zeros(num_sequences, marks.size(1)).index_add_(0, index, marks)
        dist.all_reduce(counts, group=router.tp_cp_group)
        length = counts[:, -1:].clamp(min=1)  # a microbatch of padding alone has none
        num_experts = scores.size(1)
        weights = num_experts * counts[:, :-1] / (router.topk * length.square())
        loss = (scores * (weights * self.coef / self.num_samples)[index] * is_token[:, None]).sum()
        self._sum += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def take(self) -> float:
        """The term's value since it was last taken, over all ranks; collective."""
        dist.all_reduce(self._sum)
        value = float(self._sum)
        self._sum.zero_()
        return value
