"""How one Megatron tensor is made of HF tensors: whole, in tensor-parallel shards, and back.

A kind is chosen by name in a family's table. It answers four questions and knows nothing of names
or layers: the full tensor's shape, one rank's shard read from a source (only the rows or columns
it needs), the full tensor from all shards, and the HF tensors from the full tensor.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Optional, Protocol

import torch

from megatron_zero.convert.hf_config import Dims
from megatron_zero.convert.sources import TensorSource
from megatron_zero.convert.tensors import (
    add_vocab_padding,
    merge_gate_up_shards,
    pack_gate_up,
    pack_qkv,
    remove_vocab_padding,
    unpack_gate_up,
    unpack_qkv,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Rank `rank` of `size` along `dim`; `dim=None` is a replicated tensor."""

    dim: Optional[int]
    rank: int
    size: int

    def bounds(self, length: int) -> tuple[int, int]:
        """Start and end (excluded) of this rank's part of `length` positions."""
        part = length // self.size
        return self.rank * part, (self.rank + 1) * part

    def read(self, source: TensorSource, name: str) -> torch.Tensor:
        """This rank's part of one tensor."""
        if self.dim is None or self.size == 1:
            return source.read(name)
        start, end = self.bounds(source.shape(name)[self.dim])
        return source.read(name, self.dim, start, end)


class Kind(Protocol):
    """One way of packing. `hf` arguments and results are in the order of the rule's `hf`."""

    num_hf: int  # HF tensors that make one Megatron tensor
    num_blocks: int  # blocks along the split dim of which every rank holds its part

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        """Shape of the unsharded Megatron tensor."""
        ...

    def read_shard(
        self, source: TensorSource, names: Sequence[str], split: Split, dims: Dims
    ) -> torch.Tensor:
        """One rank's shard; sizes were checked to divide."""
        ...

    def merge(self, shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The full tensor from the shards of all ranks, in rank order."""
        ...

    def to_hf(self, full: torch.Tensor, dims: Dims) -> Sequence[torch.Tensor]:
        """The HF tensors of a full Megatron tensor."""
        ...

    def rows(self, hf_shapes: Sequence[Shape], dims: Dims) -> list[list[tuple[int, int]]]:
        """The same as ranges: for each HF tensor the rows of the full one that make it."""
        ...


class CopyKind:
    """The same tensor on both sides, split along any dim or replicated."""

    num_hf: ClassVar[int] = 1
    num_blocks: ClassVar[int] = 1

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        return hf_shapes[0]

    def read_shard(
        self, source: TensorSource, names: Sequence[str], split: Split, dims: Dims
    ) -> torch.Tensor:
        return split.read(source, names[0])

    def merge(self, shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return torch.cat(tuple(shards), dim=dim)

    def to_hf(self, full: torch.Tensor, dims: Dims) -> Sequence[torch.Tensor]:
        return (full,)

    def rows(self, hf_shapes: Sequence[Shape], dims: Dims) -> list[list[tuple[int, int]]]:
        return _interleaved(hf_shapes, 1)


class QkvKind(CopyKind):
    """q, k, v interleaved per key-value group; shards are plain row ranges of the packed tensor.

    With more ranks than groups a shard is a part of one group, possibly across the border between
    its queries and its key: Megatron gathers the rows again before it uses them. Only the groups a
    shard overlaps are read.
    """

    num_hf: ClassVar[int] = 3

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        return (sum(shape[0] for shape in hf_shapes), *hf_shapes[0][1:])

    def read_shard(
        self, source: TensorSource, names: Sequence[str], split: Split, dims: Dims
    ) -> torch.Tensor:
        groups, head_dim = dims["num_key_value_heads"], dims["head_dim"]
        query_rows = dims["num_attention_heads"] // groups * head_dim
        group_rows = query_rows + 2 * head_dim
        start, end = split.bounds(groups * group_rows)
        first, last = start // group_rows, -(-end // group_rows)
        parts = [
            source.read(name, 0, first * rows, last * rows)
            for name, rows in zip(names, (query_rows, head_dim, head_dim), strict=True)
        ]
        packed = pack_qkv(*parts, num_groups=last - first)
        return packed.narrow(0, start - first * group_rows, end - start)

    def to_hf(self, full: torch.Tensor, dims: Dims) -> Sequence[torch.Tensor]:
        return unpack_qkv(full, dims["num_attention_heads"], dims["num_key_value_heads"])

    def rows(self, hf_shapes: Sequence[Shape], dims: Dims) -> list[list[tuple[int, int]]]:
        return _interleaved(hf_shapes, dims["num_key_value_heads"])


class GateUpKind(CopyKind):
    """gate over up; every rank holds its rows of gate over its rows of up."""

    num_hf: ClassVar[int] = 2
    num_blocks: ClassVar[int] = 2

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        return (hf_shapes[0][0] + hf_shapes[1][0], *hf_shapes[0][1:])

    def read_shard(
        self, source: TensorSource, names: Sequence[str], split: Split, dims: Dims
    ) -> torch.Tensor:
        return pack_gate_up(*(split.read(source, name) for name in names))

    def merge(self, shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        return merge_gate_up_shards(shards)

    def to_hf(self, full: torch.Tensor, dims: Dims) -> Sequence[torch.Tensor]:
        return unpack_gate_up(full)


class VocabKind(CopyKind):
    """One row per token, with zero rows after the last up to `padded_vocab_size`."""

    def full_shape(self, hf_shapes: Sequence[Shape], dims: Dims) -> Shape:
        return (dims["padded_vocab_size"], *hf_shapes[0][1:])

    def read_shard(
        self, source: TensorSource, names: Sequence[str], split: Split, dims: Dims
    ) -> torch.Tensor:
        start, end = split.bounds(dims["padded_vocab_size"])
        real = [min(bound, dims["vocab_size"]) for bound in (start, end)]
        return add_vocab_padding(source.read(names[0], 0, *real), end - start)

    def to_hf(self, full: torch.Tensor, dims: Dims) -> Sequence[torch.Tensor]:
        return (remove_vocab_padding(full, dims["vocab_size"]),)


def _interleaved(hf_shapes: Sequence[Shape], groups: int) -> list[list[tuple[int, int]]]:
    """The ranges where every group has its part of each tensor, one after the other."""
    ends = list(itertools.accumulate(shape[0] // groups for shape in hf_shapes))
    bounds = list(zip([0, *ends], ends, strict=False))
    return [[(g * ends[-1] + a, g * ends[-1] + b) for g in range(groups)] for a, b in bounds]


KINDS: dict[str, Kind] = {
    "copy": CopyKind(),
    "qkv": QkvKind(),
    "gate_up": GateUpKind(),
    "vocab": VocabKind(),
}
