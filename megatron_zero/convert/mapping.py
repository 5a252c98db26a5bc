"""The engine that applies a family's table to one model, in both directions.

A `Mapping` is a family applied to one `config.json`. It serves loading, saving, the conversion
tools and weight sync, and it is strict: whatever has no rule, is left over or has another shape
raises `ValueError` with the tensor's name.

Names carry the global layer index of the whole model; a pipeline stage or virtual chunk adds its
offset before asking. Tensor-parallel ranks and sizes are plain integers.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from megatron_zero.checks import UserError, fail
from megatron_zero.convert.hf_config import HfConfig, rope_settings
from megatron_zero.convert.rules import INDEX, Family, Rule
from megatron_zero.convert.sources import TensorSource
from megatron_zero.convert.tensors import KINDS, Kind, Ranges, Shape, take_rows

EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One rule at one index: all names and shapes of one Megatron parameter."""

    name: str
    kind: Kind
    tp_dim: Optional[int]  # what tensor parallelism splits; None: replicated
    hf_names: tuple[str, ...]  # what it is read from
    hf_shapes: tuple[Shape, ...]
    hf_rows: list[Ranges]  # of the full tensor, for each HF tensor
    full_shape: Shape
    exported: bool
    float32: bool  # whatever the dtype of the weights
    checkpoint_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEntry:
    """Where a parameter stands in a Megatron distributed checkpoint.

    Layers have keys of their own (Megatron's `non_homogeneous_layers`); the experts of a layer
    share one, stacked along a first dim: `expert` is the index there, None without that dim.
    """

    key: str
    shape: Shape  # of the whole key, stacked experts included
    expert: Optional[int]

    def within(self, offsets: Shape, sizes: Shape) -> tuple[Shape, Shape]:
        """A block of the parameter as one of the key: where it starts, and its sizes."""
        stacked = self.expert is not None
        return ((self.expert, *offsets), (1, *sizes)) if stacked else (offsets, sizes)


class Mapping:
    """A family's table for one model.

    Args:
        family: from `families.family_for`.
        hf_config: the model's `config.json`.
        padded_vocab_size: rows of Megatron's embedding; None for the model's `vocab_size`.
        with_mtp: whether multi-token-prediction layers are part of it; else they are ignored.

    Attributes:
        rope: rotary settings.
        tied: whether input and output embedding are one tensor.
        dims: the model's sizes, `padded_vocab_size` among them.
        layer_sets: indices of the layers by kind, "all" among them.
        config: `hf_config` over the defaults of the HF class.

    Raises:
        ValueError: if the config is not covered (see `Family.check_config`), or
            `padded_vocab_size` is below `vocab_size`.
    """

    def __init__(
        self,
        family: Family,
        hf_config: HfConfig,
        padded_vocab_size: Optional[int] = None,
        *,
        with_mtp: bool = True,
    ) -> None:
        family.check_config(hf_config)
        self.family = family
        self.config: dict[str, object] = {**family.defaults, **hf_config}
        self.rope = rope_settings(hf_config, family.rope_theta)
        self.tied = bool(self.config["tie_word_embeddings"])
        self.dims = family.dims(self.config)
        vocab_size = self.dims["vocab_size"]
        padded = vocab_size if padded_vocab_size is None else padded_vocab_size
        if padded < vocab_size:
            fail("padded_vocab_size", padded, f"must be at least vocab_size={vocab_size}")
        self.dims["padded_vocab_size"] = padded
        self.layer_sets = family.layer_sets(self.config, self.dims)
        ignored = list(family.ignored)
        if self.dims.get("mtp") and not with_mtp:
            first = self.dims["num_hidden_layers"]
            layers = "|".join(str(first + i) for i in range(self.dims["mtp"]))
            ignored.append(rf"model\.layers\.({layers})\..*")
            self.dims["mtp"] = 0
        self._ignored = re.compile("|".join(ignored))
        self._parameters: dict[str, Parameter] = {}
        self._aliases: dict[str, str] = {}
        self._hf: dict[str, tuple[Shape, str]] = {}  # name -> shape, init
        for rule, index in self._expand():
            self._add(rule, index)
        self._copies: dict[str, list[str]] = {}  # original -> its copies
        for name, original in family.copies(self.dims).items():
            self._copies.setdefault(original, []).append(name)
            self._hf[name] = self._hf[original]

    def megatron_names(self) -> tuple[str, ...]:
        """Every parameter of the unsplit Megatron model, in the order of the forward pass.

        Without the last stage's copy of a tied embedding, which other methods do accept.
        """
        return tuple(name for name, p in self._parameters.items() if p.exported)

    def hf_names(self) -> tuple[str, ...]:
        """Every tensor of the HF checkpoint, in the order of the forward pass."""
        return tuple(self._hf)

    def copies(self) -> dict[str, str]:
        """HF tensors that repeat another one, by the name of that one."""
        return {copy: name for name, copies in self._copies.items() for copy in copies}

    def hf_shape(self, hf_name: str) -> Shape:
        """Shape of one HF tensor. Raises `ValueError` for a name outside `hf_names()`."""
        return self._hf_entry(hf_name)[0]

    def hf_init(self, hf_name: str) -> str:
        """How a fresh HF tensor starts: normal, zeros or ones."""
        return self._hf_entry(hf_name)[1]

    def hf_targets(self, megatron_name: str) -> tuple[str, ...]:
        """The HF tensors a Megatron parameter is written to, copies included, as by `to_hf`."""
        parameter = self.parameter(megatron_name)
        names = parameter.hf_names if parameter.exported else ()
        return (*names, *(copy for name in names for copy in self._copies.get(name, ())))

    def canonical_name(self, megatron_name: str) -> str:
        """The table's own name of a parameter that may be given by an alias."""
        return self.parameter(megatron_name).name

    def checkpoint_entry(self, megatron_name: str) -> CheckpointEntry:
        """The parameter's place in a distributed checkpoint; layouts do not change it."""
        parameter = self.parameter(megatron_name)
        name, shape = parameter.checkpoint_name, parameter.full_shape
        match = EXPERT.search(name)
        if match is None:
            return CheckpointEntry(key=name, shape=shape, expert=None)
        return CheckpointEntry(
            key=EXPERT.sub("experts.experts.", name),
            shape=(self.dims["num_experts"], *shape),
            expert=int(match.group(1)),
        )

    def full_shape(self, megatron_name: str) -> Shape:
        """Shape of the unsharded Megatron parameter."""
        return self.parameter(megatron_name).full_shape

    def shard_shape(self, megatron_name: str, tp_size: int) -> Shape:
        """Shape of every rank's shard.

        Raises:
            ValueError: if the name is unknown or its size does not divide by `tp_size`.
        """
        parameter = self.parameter(megatron_name)
        full, dim = parameter.full_shape, parameter.tp_dim
        if dim is None:
            return full
        if full[dim] % (tp_size * parameter.kind.num_blocks):
            positions = f"{full[dim] // parameter.kind.num_blocks} positions of dim {dim}"
            rule = f"{positions} do not divide by tensor-parallel size {tp_size}"
            raise UserError(f"Megatron parameter {parameter.name}: {rule}")
        return (*full[:dim], full[dim] // tp_size, *full[dim + 1 :])

    def check_source(self, source: TensorSource) -> None:
        """Compare names and shapes of a whole checkpoint with the table; reads no tensor.

        Raises:
            ValueError: naming the tensors that are missing, that no rule covers, or the first
                with a wrong shape.
        """
        present = source.names()
        missing = sorted(set(self._hf) - set(present))
        if missing:
            raise UserError(f"HF checkpoint lacks {_listed(missing)}{self._way_out(missing)}")
        extra = (name for name in present if name not in self._hf)
        unmapped = sorted(name for name in extra if not self._ignored.fullmatch(name))
        if unmapped:
            rule = f"no {self.family.model_type} rule"
            raise UserError(f"HF checkpoint has {_listed(unmapped)}: {rule} maps it")
        for name, (shape, _) in self._hf.items():
            if source.shape(name) != shape:
                label = f"HF tensor {name}{source.origin(name)}"
                check_shape(label, source.shape(name), shape)

    def _way_out(self, missing: Sequence[str]) -> str:
        """What to do when nothing but prediction layers is missing."""
        first, count = self.dims["num_hidden_layers"], self.dims.get("mtp", 0)
        places = tuple(f"model.layers.{first + i}." for i in range(count))
        if not all(name.startswith(places) for name in missing):
            return ""
        return ": multi-token prediction is stored in part only, --drop-mtp leaves it out"

    def to_megatron_shard(
        self, megatron_name: str, source: TensorSource, tp_rank: int, tp_size: int
    ) -> torch.Tensor:
        """One rank's shard of a parameter, reading only what it needs.

        Args:
            megatron_name: with the global layer index.
            source: the HF tensors.
            tp_rank: 0 <= tp_rank < tp_size.
            tp_size: number of tensor-parallel ranks.

        Returns:
            A tensor of `shard_shape(megatron_name, tp_size)` in the source's dtype. It may share
            memory with the source: copy it into the parameter.

        Raises:
            ValueError: if the name is unknown, the size does not divide, or an HF tensor is
                missing or has a wrong shape.
        """
        assert 0 <= tp_rank < tp_size, f"tp_rank={tp_rank} of tp_size={tp_size}"
        parameter = self.parameter(megatron_name)
        shape = self.shard_shape(megatron_name, tp_size)
        if parameter.tp_dim is None or tp_size == 1:
            pieces = self.to_megatron_rows(megatron_name, source)
        elif parameter.tp_dim == 0:
            blocks, rows = parameter.kind.num_blocks, shape[0] // parameter.kind.num_blocks
            starts = [(block * tp_size + tp_rank) * rows for block in range(blocks)]
            pieces = [p for at in starts for p in _read_rows(parameter, source, at, at + rows)]
        else:
            (name,), columns = parameter.hf_names, shape[1]
            check_shape(f"HF tensor {name}", source.shape(name), parameter.full_shape)
            part = slice(tp_rank * columns, (tp_rank + 1) * columns)
            pieces = [source.read(name, slice(None), part)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def merge_shards(self, megatron_name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full parameter from the shards of all tensor-parallel ranks.

        Args:
            megatron_name: with the global layer index.
            shards: in rank order, one per rank. Of a replicated parameter the first is returned:
                one is enough, and equality of the others is not looked at.

        Raises:
            ValueError: if the name is unknown or a shard has a wrong shape.
        """
        assert shards, f"no shards of {megatron_name}"
        parameter = self.parameter(megatron_name)
        expected = self.shard_shape(megatron_name, len(shards))
        for rank, shard in enumerate(shards):
            label = f"Megatron shard {megatron_name} of tensor-parallel rank {rank}"
            check_shape(label, tuple(shard.shape), expected)
        if parameter.tp_dim is None or len(shards) == 1:
            return shards[0]
        blocks = (shard.chunk(parameter.kind.num_blocks, parameter.tp_dim) for shard in shards)
        return torch.cat(list(itertools.chain(*zip(*blocks, strict=True))), parameter.tp_dim)

    def to_hf(self, megatron_name: str, full: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The HF tensors of a full Megatron parameter, with their names.

        Empty for the last stage's copy of a tied embedding, which HF does not store. Results may
        be views of `full`.

        Raises:
            ValueError: if the name is unknown or the shape is not `full_shape(megatron_name)`.
        """
        parameter = self.parameter(megatron_name)
        check_shape(f"Megatron {megatron_name}", tuple(full.shape), parameter.full_shape)
        tensors = self.to_hf_rows(megatron_name, [full]).items()
        return [(name, p[0] if len(p) == 1 else torch.cat(p)) for name, p in tensors]

    def to_megatron_rows(self, megatron_name: str, source: TensorSource) -> list[torch.Tensor]:
        """The full parameter in pieces, one after the other along dim 0: views of what was read.

        For who writes it piece by piece: it is never put together.

        Raises:
            ValueError: if the name is unknown, or an HF tensor is missing or has a wrong shape.
        """
        parameter = self.parameter(megatron_name)
        return _read_rows(parameter, source, 0, parameter.full_shape[0])

    def to_hf_rows(
        self, megatron_name: str, pieces: Sequence[torch.Tensor]
    ) -> dict[str, list[torch.Tensor]]:
        """`to_hf` of a parameter in pieces: HF tensors in pieces, all along dim 0."""
        parameter = self.parameter(megatron_name)
        named = {
            name: [piece for start, end in rows for piece in take_rows(pieces, start, end)]
            for name, rows in zip(parameter.hf_names, parameter.hf_rows, strict=True)
        }
        copies = {c: named[name] for name in named for c in self._copies.get(name, ())}
        return named | copies if parameter.exported else {}

    def _expand(self) -> Iterator[tuple[Rule, dict[str, int]]]:
        """Each rule at each index; neighbouring rules of a layer stay together."""
        rules = self.family.rules
        rules += self.family.tied_rules if self.tied else self.family.untied_rules
        for layered, group in itertools.groupby(rules, key=lambda rule: "{layer}" in rule.megatron):
            layers = self.layer_sets["all"] if layered else (0,)
            for layer, rule in itertools.product(layers, group):
                if not layered or layer in self.layer_sets[rule.layers]:
                    yield from ((rule, index) for index in self._indices(rule, layer))

    def _indices(self, rule: Rule, layer: int) -> Iterator[dict[str, int]]:
        """All values of the rule's placeholders besides `{layer}`."""
        others = sorted(set(INDEX.findall(rule.megatron)) - {"layer"})
        ranges = [range(self.dims[self.family.counts[name]]) for name in others]
        for values in itertools.product(*ranges):
            index = dict(zip(others, values, strict=True)) | {"layer": layer}
            yield index | {"mtp_layer": self.dims["num_hidden_layers"] + index.get("mtp", 0)}

    def _add(self, rule: Rule, index: dict[str, int]) -> None:
        kind = KINDS[rule.kind]
        shapes = tuple(tuple(self.dims[size] for size in tensor.shape) for tensor in rule.hf)
        parameter = Parameter(
            name=rule.megatron.format(**index),
            kind=kind,
            tp_dim=rule.tp_dim,
            hf_names=tuple(tensor.name.format(**index) for tensor in rule.hf),
            hf_shapes=shapes,
            hf_rows=kind.ranges(shapes, self.dims),
            full_shape=kind.full_shape(shapes, self.dims),
            exported=rule.exported,
            float32=rule.float32,
            checkpoint_name=(rule.alias or rule.megatron).format(**index),
        )
        assert parameter.name not in self._parameters, f"two rules for {parameter.name}"
        self._parameters[parameter.name] = parameter
        self._aliases[parameter.checkpoint_name] = parameter.name
        if rule.exported:
            entries = zip(parameter.hf_names, shapes, rule.hf, strict=True)
            for name, shape, tensor in entries:
                assert name not in self._hf, f"two rules export {name}"
                self._hf[name] = (shape, tensor.init)

    def parameter(self, megatron_name: str) -> Parameter:
        """Everything about one parameter, which may be given by its alias.

        Raises:
            ValueError: no rule maps it.
        """
        name = self._aliases.get(megatron_name, megatron_name)
        if name not in self._parameters:
            rule = f"no rule of {self.family.model_type}"
            raise UserError(f"Megatron parameter {megatron_name}: {rule} maps it")
        return self._parameters[name]

    def _hf_entry(self, hf_name: str) -> tuple[Shape, str]:
        if hf_name not in self._hf:
            raise UserError(f"HF tensor {hf_name}: no rule of {self.family.model_type} maps it")
        return self._hf[hf_name]


def _read_rows(
    parameter: Parameter, source: TensorSource, begin: int, end: int
) -> list[torch.Tensor]:
    """Rows begin to end of a full parameter, in pieces: views of what was read, and no more is."""
    pieces: dict[int, torch.Tensor] = {}  # by the row of the full parameter
    rows = zip(parameter.hf_names, parameter.hf_shapes, parameter.hf_rows, strict=True)
    for name, shape, ranges in rows:
        check_shape(f"HF tensor {name}", source.shape(name), shape)
        skipped = sum(min(b, begin) - a for a, b in ranges if a < begin)
        wanted = {max(a, begin): min(b, end) for a, b in ranges if a < end and b > begin}
        sizes = [last - first for first, last in wanted.items()]
        part = slice(skipped, skipped + sum(sizes))
        tensor = source.read(name) if sum(sizes) == shape[0] else source.read(name, part)
        pieces |= zip(wanted, tensor.split(sizes), strict=True)
    missing = end - begin - sum(map(len, pieces.values()))  # the vocabulary's padding
    if missing:
        pieces[end] = tensor.new_zeros(missing, *shape[1:])
    return [pieces[at] for at in sorted(pieces)]


def check_shape(label: str, shape: Shape, expected: Shape) -> None:
    """Refuse a tensor that is not what the table says."""
    if tuple(shape) != expected:
        raise UserError(f"{label} has shape {list(shape)}, expected {list(expected)}")


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
