"""How one Megatron tensor is made of HF tensors: which of its rows are whose.

Only dim 0 (output rows) is ever rearranged, so weights [rows, hidden] and biases [rows] are alike.
A kind is chosen by name in a family's table and knows nothing of names or layers. Everything else
follows from its ranges of rows: a rank's shard, the full tensor in pieces, and the HF tensors from
it. All are permutations, concatenations or removals of rows: bitwise reversible in any dtype.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_zero.convert.hf_config import Dims

Shape = tuple[int, ...]
Ranges = list[tuple[int, int]]  # of rows, [start, end)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One way of packing HF tensors along dim 0.

    Attributes:
        num_hf: HF tensors that make one Megatron tensor.
        num_blocks: blocks along the split dim of which every tensor-parallel rank holds its part.
        groups: a key of `Dims`: so many groups follow one another, each with its part of every HF
            tensor. Empty: the HF tensors themselves do.
        rows: a key of `Dims`: rows of the full tensor, zeros after the last HF row. Empty: no more
            than the HF tensors have.
    """

    num_hf: int = 1
    num_blocks: int = 1
    groups: str = ""
    rows: str = ""

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        """Shape of the unsharded Megatron tensor."""
        rows = dims[self.rows] if self.rows else sum(shape[0] for shape in hf_shapes)
        return (rows, *hf_shapes[0][1:])

    def ranges(self, hf_shapes: Sequence[Shape], dims: Dims) -> list[Ranges]:
        """For each HF tensor the rows of the full one that make it, in its order."""
        groups = dims[self.groups] if self.groups else 1
        ends = list(itertools.accumulate(shape[0] // groups for shape in hf_shapes))
        bounds = list(itertools.pairwise([0, *ends]))
        return [[(g * ends[-1] + a, g * ends[-1] + b) for g in range(groups)] for a, b in bounds]


KINDS: dict[str, Kind] = {
    # The same tensor on both sides, split along any dim or replicated.
    "copy": Kind(),
    # Group after group, each its query heads, its key, its value: q0 q1 k0 v0 q2 q3 k1 v1 for 4
    # heads and 2 groups. Shards are plain ranges of that. With more ranks than groups one is a part
    # of a group, possibly across the border between its queries and its key: Megatron gathers the
    # rows again before it uses them.
    "qkv": Kind(num_hf=3, groups="num_key_value_heads"),
    # gate over up; every rank holds its rows of gate over its rows of up.
    "gate_up": Kind(num_hf=2, num_blocks=2),
    # One row per token; what the padding becomes in training does not leave Megatron.
    "vocab": Kind(rows="padded_vocab_size"),
}


def take_rows(pieces: Sequence[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """Rows start to end (excluded) of tensors that follow one another along dim 0: views."""
    taken, at = [], 0
    for piece in pieces:
        first, last = max(start - at, 0), min(end - at, len(piece))
        if first < last:
            taken.append(piece[first:last])
        at += len(piece)
    return taken
