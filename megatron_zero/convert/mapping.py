"""One table per model family, and the engine that applies it to one model in both directions.

A `Rule` says which HF tensors make which Megatron parameter, how (`kinds`) and how the parameter
is split over tensor-parallel ranks. A `Family` is the rules of one HF `model_type` and what its
config must say for them to hold. A `Mapping` is a family applied to one `config.json`. It serves
loading, saving, the conversion tools and weight sync, and it is strict: whatever has no rule, is
left over or has another shape raises `ValueError` with the tensor's name.

Names carry the global layer index of the whole model; a pipeline stage or virtual chunk adds its
offset before asking. Tensor-parallel ranks and sizes are plain integers.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch

from megatron_zero.convert.hf_config import (
    ConfigCheck,
    Dims,
    HfConfig,
    check_fields,
    decoder_dims,
    rope_settings,
)
from megatron_zero.convert.kinds import KINDS, Kind, Shape, Split
from megatron_zero.convert.sources import TensorSource

INITS = ("normal", "zeros", "ones")
INDEX = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor of the HF checkpoint: name pattern, shape in sizes of `Dims`, and how it starts.

    Example: HfTensor("model.layers.{layer}.self_attn.q_proj.bias", ("q_rows",), init="zeros")
    """

    name: str
    shape: tuple[str, ...]
    init: str = "normal"  # normal: standard deviation `initializer_range`; zeros; ones

    def __post_init__(self) -> None:
        assert self.init in INITS, f"{self.name}: init={self.init!r} is not one of {INITS}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How HF tensors make one Megatron parameter, for every layer (and expert) at once.

    `megatron` and `hf` hold the same placeholders, such as `{layer}`; the family says how far each
    counts. `aliases` are other names of the same parameter: Transformer Engine's fused layers put
    a norm's weight inside the linear layer behind it.
    """

    megatron: str
    hf: tuple[HfTensor, ...]
    kind: str = "copy"  # a key of `kinds.KINDS`
    tp_dim: Optional[int] = None  # None: every tensor-parallel rank holds all of it
    aliases: tuple[str, ...] = ()
    exported: bool = True  # False: a copy that the HF checkpoint holds under another rule

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"{self.megatron}: unknown kind {self.kind!r}"
        assert len(self.hf) == KINDS[self.kind].num_hf, f"{self.megatron}: wrong number of tensors"
        names = (*self.aliases, *(tensor.name for tensor in self.hf))
        wanted = set(INDEX.findall(self.megatron))
        differing = [name for name in names if set(INDEX.findall(name)) != wanted]
        assert not differing, f"{self.megatron}: other placeholders in {differing}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything the engine knows of one HF `model_type`.

    `defaults` are the values the HF config class fills in for fields that are not written.
    `ignored` are regular expressions of HF tensors that may be stored and are never read, unless a
    rule maps them.
    """

    model_type: str
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    tied_rules: tuple[Rule, ...]  # added when tie_word_embeddings is true
    untied_rules: tuple[Rule, ...]  # added when it is false
    checks: tuple[ConfigCheck, ...]
    defaults: dict[str, object]
    rope_types: tuple[str, ...] = ("default",)
    counts: dict[str, str] = field(default_factory=lambda: {"layer": "num_hidden_layers"})
    dims: Callable[[HfConfig], Dims] = decoder_dims
    ignored: tuple[str, ...] = ()

    def check_config(self, hf_config: HfConfig) -> None:
        """Refuse a config whose mathematics the rules do not describe.

        Raises:
            ValueError: naming the field.
        """
        architectures = hf_config.get("architectures") or ()
        names = [architectures] if isinstance(architectures, str) else list(architectures)
        for name in names:
            if name not in self.architectures:
                raise ValueError(
                    f"HF config architectures={names}: must be one of {list(self.architectures)}"
                )
        check_fields(hf_config, self.checks)
        default_theta = self.defaults.get("rope_theta")
        rope = rope_settings(hf_config, default_theta)  # type: ignore[arg-type]
        if rope.rope_type not in self.rope_types:
            raise ValueError(
                f"HF config rope_type={rope.rope_type!r}: rescaled positions are not covered; "
                f"must be one of {list(self.rope_types)}"
            )
        if rope.partial_rotary_factor != 1.0:
            raise ValueError(
                f"HF config partial_rotary_factor={rope.partial_rotary_factor}: must be 1.0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """One rule at one index: all names and shapes of one Megatron parameter."""

    name: str
    kind: Kind
    tp_dim: Optional[int]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    full_shape: Shape
    exported: bool


class Mapping:
    """A family's table for one model.

    Args:
        family: from `families.family_for`.
        hf_config: the model's `config.json`.
        padded_vocab_size: rows of Megatron's embedding; None for the model's `vocab_size`.

    Attributes:
        tied: whether input and output embedding are one tensor.
        dims: the model's sizes, `padded_vocab_size` among them.
        config: `hf_config` over the defaults of the HF class.

    Raises:
        ValueError: if the config is not covered (see `Family.check_config`), or
            `padded_vocab_size` is below `vocab_size`.
    """

    def __init__(
        self, family: Family, hf_config: HfConfig, padded_vocab_size: Optional[int] = None
    ) -> None:
        family.check_config(hf_config)
        self.family = family
        self.config: dict[str, object] = {**family.defaults, **hf_config}
        self.tied = bool(self.config["tie_word_embeddings"])
        self.dims = family.dims(self.config)
        vocab_size = self.dims["vocab_size"]
        padded = vocab_size if padded_vocab_size is None else padded_vocab_size
        if padded < vocab_size:
            raise ValueError(
                f"padded_vocab_size={padded}: must be at least vocab_size={vocab_size}"
            )
        self.dims["padded_vocab_size"] = padded
        self._parameters: dict[str, _Parameter] = {}
        self._aliases: dict[str, str] = {}
        self._hf: dict[str, tuple[Shape, str]] = {}  # name -> shape, init
        for rule, index in self._expand():
            self._add(rule, index)
        self._ignored = tuple(re.compile(pattern) for pattern in family.ignored)

    def megatron_names(self) -> tuple[str, ...]:
        """Every parameter of the unsplit Megatron model, in the order of the forward pass.

        Without the last stage's copy of a tied embedding, which other methods do accept.
        """
        return tuple(name for name, p in self._parameters.items() if p.exported)

    def hf_names(self) -> tuple[str, ...]:
        """Every tensor of the HF checkpoint, in the order of the forward pass."""
        return tuple(self._hf)

    def hf_shape(self, hf_name: str) -> Shape:
        """Shape of one HF tensor. Raises `ValueError` for a name outside `hf_names()`."""
        return self._hf_entry(hf_name)[0]

    def hf_init(self, hf_name: str) -> str:
        """How a fresh HF tensor starts: normal, zeros or ones."""
        return self._hf_entry(hf_name)[1]

    def hf_sources(self, megatron_name: str) -> tuple[str, ...]:
        """The HF tensors a Megatron parameter is read from."""
        return self._parameter(megatron_name).hf_names

    def canonical_name(self, megatron_name: str) -> str:
        """The table's own name of a parameter that may be given by an alias."""
        return self._parameter(megatron_name).name

    def tp_dim(self, megatron_name: str) -> Optional[int]:
        """The dim that tensor parallelism splits; None for a replicated parameter."""
        return self._parameter(megatron_name).tp_dim

    def full_shape(self, megatron_name: str) -> Shape:
        """Shape of the unsharded Megatron parameter."""
        return self._parameter(megatron_name).full_shape

    def shard_shape(self, megatron_name: str, tp_size: int) -> Shape:
        """Shape of every rank's shard.

        Raises:
            ValueError: if the name is unknown or its size does not divide by `tp_size`.
        """
        return self._shard_shape(self._parameter(megatron_name), tp_size)

    def check_source(self, source: TensorSource) -> None:
        """Compare names and shapes of a whole checkpoint with the table; reads no tensor.

        Raises:
            ValueError: naming the tensors that are missing, that no rule covers, or the first
                with a wrong shape.
        """
        present = source.names()
        missing = sorted(set(self._hf) - set(present))
        if missing:
            raise ValueError(f"HF checkpoint lacks {_listed(missing)}")
        extra = [name for name in present if name not in self._hf]
        unmapped = sorted(
            name for name in extra if not any(p.fullmatch(name) for p in self._ignored)
        )
        if unmapped:
            raise ValueError(
                f"HF checkpoint has {_listed(unmapped)}: no {self.family.model_type} rule maps it"
            )
        for name, (shape, _) in self._hf.items():
            _check_shape(f"HF tensor {name}", source.shape(name), shape)

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
        parameter = self._parameter(megatron_name)
        expected = self._shard_shape(parameter, tp_size)
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
            _check_shape(f"HF tensor {name}", source.shape(name), shape)
        replicated = parameter.tp_dim is None
        split = Split(None, 0, 1) if replicated else Split(parameter.tp_dim, tp_rank, tp_size)
        shard = parameter.kind.read_shard(source, parameter.hf_names, split, self.dims)
        _check_shape(f"Megatron shard {megatron_name}", tuple(shard.shape), expected)
        return shard

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
        parameter = self._parameter(megatron_name)
        expected = self._shard_shape(parameter, len(shards))
        for rank, shard in enumerate(shards):
            label = f"Megatron shard {megatron_name} of tensor-parallel rank {rank}"
            _check_shape(label, tuple(shard.shape), expected)
        if parameter.tp_dim is None or len(shards) == 1:
            return shards[0]
        return parameter.kind.merge(shards, parameter.tp_dim)

    def to_hf(self, megatron_name: str, full: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The HF tensors of a full Megatron parameter, with their names.

        Empty for the last stage's copy of a tied embedding, which HF does not store. Results may
        be views of `full`.

        Raises:
            ValueError: if the name is unknown or the shape is not `full_shape(megatron_name)`.
        """
        parameter = self._parameter(megatron_name)
        _check_shape(f"Megatron {megatron_name}", tuple(full.shape), parameter.full_shape)
        if not parameter.exported:
            return []
        tensors = parameter.kind.to_hf(full, self.dims)
        return list(zip(parameter.hf_names, tensors, strict=True))

    def _expand(self) -> Iterator[tuple[Rule, dict[str, int]]]:
        """Each rule at each index; neighbouring rules of a layer stay together."""
        rules = self.family.rules
        rules += self.family.tied_rules if self.tied else self.family.untied_rules
        for layered, group in itertools.groupby(rules, key=lambda rule: "{layer}" in rule.megatron):
            members = list(group)
            for layer in range(self._count("layer")) if layered else (0,):
                for rule in members:
                    others = sorted(set(INDEX.findall(rule.megatron)) - {"layer"})
                    ranges = [range(self._count(name)) for name in others]
                    for values in itertools.product(*ranges):
                        yield rule, dict(zip(others, values, strict=True)) | {"layer": layer}

    def _count(self, placeholder: str) -> int:
        return self.dims[self.family.counts[placeholder]]

    def _add(self, rule: Rule, index: dict[str, int]) -> None:
        kind = KINDS[rule.kind]
        shapes = tuple(tuple(self.dims[size] for size in tensor.shape) for tensor in rule.hf)
        parameter = _Parameter(
            name=rule.megatron.format(**index),
            kind=kind,
            tp_dim=rule.tp_dim,
            hf_names=tuple(tensor.name.format(**index) for tensor in rule.hf),
            hf_shapes=shapes,
            full_shape=kind.full_shape(shapes, self.dims),
            exported=rule.exported,
        )
        assert parameter.name not in self._parameters, f"two rules for {parameter.name}"
        self._parameters[parameter.name] = parameter
        for alias in rule.aliases:
            self._aliases[alias.format(**index)] = parameter.name
        if rule.exported:
            entries = zip(parameter.hf_names, shapes, rule.hf, strict=True)
            for name, shape, tensor in entries:
                assert name not in self._hf, f"two rules export {name}"
                self._hf[name] = (shape, tensor.init)

    def _parameter(self, megatron_name: str) -> _Parameter:
        name = self._aliases.get(megatron_name, megatron_name)
        if name not in self._parameters:
            raise ValueError(
                f"Megatron parameter {megatron_name}: no rule of {self.family.model_type} maps it"
            )
        return self._parameters[name]

    def _hf_entry(self, hf_name: str) -> tuple[Shape, str]:
        if hf_name not in self._hf:
            raise ValueError(f"HF tensor {hf_name}: no rule of {self.family.model_type} maps it")
        return self._hf[hf_name]

    def _shard_shape(self, parameter: _Parameter, tp_size: int) -> Shape:
        full, dim = parameter.full_shape, parameter.tp_dim
        if dim is None:
            return full
        if full[dim] % (tp_size * parameter.kind.num_blocks):
            raise ValueError(
                f"Megatron parameter {parameter.name}: {full[dim] // parameter.kind.num_blocks} "
                f"positions of dim {dim} do not divide by tensor-parallel size {tp_size}"
            )
        return (*full[:dim], full[dim] // tp_size, *full[dim + 1 :])


def _check_shape(label: str, shape: Shape, expected: Shape) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"{label} has shape {list(shape)}, expected {list(expected)}")


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
