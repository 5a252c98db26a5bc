"""Weights in and out of the policy by HF name: each rank reads its shards, any rank gets the whole.

Export walks the parameters of the unsplit model in one order known to all ranks, a bounded bucket
at a time: the stage that owns a bucket gathers its tensor-parallel shards, turns them into HF
tensors, and the other stages receive those.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_zero.convert.mapping import EXPERT, Mapping
from megatron_zero.convert.sources import TensorSource
from megatron_zero.policy.model import PolicyModel, global_parameter_names
from megatron_zero.policy.parallel import Topology


def named_tensors(
    chunks: Sequence[PolicyModel], topology: Topology
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Parameters, and the buffers that belong to the weights, by `global_parameter_names`."""
    for chunk in chunks:
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            if isinstance(tensor, torch.nn.Parameter) or name.endswith("router.expert_bias"):
                yield global_parameter_names(name, chunk, topology), tensor


def load(
    chunks: Sequence[PolicyModel], mapping: Mapping, source: TensorSource, topology: Topology
) -> None:
    """Fill this rank's stage, reading only its own shards.

    Raises:
        ValueError: from the mapping, naming the tensor.
    """
    mapping.check_source(source)
    with torch.no_grad():
        for names, param in named_tensors(chunks, topology):
            own = names[topology.ep_rank if len(names) > 1 else 0]
            group = _shards(own, tuple(param.shape), mapping, topology)
            shard = mapping.to_megatron_shard(own, source, group.rank, group.size)
            assert shard.shape == param.shape, f"{own}: {shard.shape} for {param.shape}"
            param.copy_(shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shards:
    """Over which ranks a parameter is split."""

    rank: int
    size: int
    group: dist.ProcessGroup


def _shards(name: str, shape: tuple[int, ...], mapping: Mapping, topology: Topology) -> _Shards:
    """TP's ranks, or the experts' own; one rank where a layer keeps the whole parameter."""
    if EXPERT.search(name):
        rank, size, group = topology.etp_rank, topology.etp_size, topology.etp_group
    else:
        rank, size, group = topology.tp_rank, topology.tp_size, topology.tp_group
    # TE's latent attention does not split its down projections; Megatron's own layers do.
    if shape == mapping.full_shape(name):
        rank, size = 0, 1
    return _Shards(rank=rank, size=size, group=group)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One parameter of a stage: its name on each expert-parallel rank, and its size."""

    names: tuple[str, ...]
    is_expert: bool
    stage: int
    num_bytes: int  # of the full tensors, all names together
    dtype: torch.dtype


def _exports(
    own: dict[tuple[str, ...], torch.Tensor], mapping: Mapping, topology: Topology
) -> list[_Export]:
    """Every exported parameter, stage by stage; the same list on every rank."""
    exported = set(mapping.megatron_names())
    mine = [
        _Export(
            names=names,
            is_expert=EXPERT.search(names[0]) is not None,
            stage=topology.pp_rank,
            num_bytes=tensor.element_size() * _numel(mapping.full_shape(names[0])) * len(names),
            dtype=tensor.dtype,
        )
        for names, tensor in own.items()
        if names[0] in exported
    ]
    stages: list[list[_Export]] = [mine]
    if topology.pp_size > 1:
        stages = [[] for _ in range(topology.pp_size)]
        dist.all_gather_object(stages, mine, group=topology.pp_group)
    exports = [export for stage in stages for export in stage]
    found = [name for export in exports for name in export.names]
    missing = exported - set(found)
    assert not missing and len(exported) == len(found), f"no stage owns {sorted(missing)}"
    return exports


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _buckets(exports: list[_Export], bucket_bytes: int) -> Iterator[list[_Export]]:
    """Neighbours of one stage, together at most `bucket_bytes` (or a single larger tensor)."""
    bucket: list[_Export] = []
    size = 0
    for export in exports:
        fits = size + export.num_bytes <= bucket_bytes
        if bucket and not (fits and _together(export, bucket[0])):
            yield bucket
            bucket, size = [], 0
        bucket.append(export)
        size += export.num_bytes
    if bucket:
        yield bucket


def _together(a: _Export, b: _Export) -> bool:
    """Whether two parameters can travel in one message."""
    return (a.stage, a.is_expert, a.dtype) == (b.stage, b.is_expert, b.dtype)


def _gather(
    tensors: list[torch.Tensor], size: int, group: dist.ProcessGroup
) -> list[tuple[torch.Tensor, ...]]:
    """Per tensor, those of all ranks of the group: one collective for a bucket."""
    if size == 1:
        return [(tensor,) for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    gathered = flat.new_empty(size * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    per_rank = [row.split([t.numel() for t in tensors]) for row in gathered.chunk(size)]
    return [
        tuple(part.view(tensor.shape) for part in parts)
        for tensor, *parts in zip(tensors, *per_rank, strict=True)
    ]


def _whole(
    bucket: list[_Export], own: list[torch.Tensor], mapping: Mapping, topology: Topology
) -> dict[str, torch.Tensor]:
    """The bucket's full Megatron parameters by name: shards joined, experts of all ranks there."""
    size, group = topology.tp_size, topology.tp_group
    if bucket[0].is_expert:
        size, group = topology.etp_size, topology.etp_group
    joined = [
        parts[0]
        if tuple(tensor.shape) == mapping.full_shape(entry.names[0])
        else mapping.merge_shards(entry.names[0], parts)
        for entry, tensor, parts in zip(bucket, own, _gather(own, size, group), strict=True)
    ]
    everywhere = _gather(joined, len(bucket[0].names), topology.ep_group)
    full: dict[str, torch.Tensor] = {}
    for entry, tensors in zip(bucket, everywhere, strict=True):
        full |= zip(entry.names, tensors, strict=True)
    return full


def export(
    chunks: Sequence[PolicyModel],
    mapping: Mapping,
    topology: Topology,
    *,
    bucket_bytes: int,
    value: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF tensor, whole, on every rank; collective, so all ranks must exhaust it.

    Args:
        bucket_bytes: bound on the tensors in flight; about three times that is allocated.
        value: what is exported of each parameter: itself, or for instance its gradient.

    Yields:
        HF name and tensor in the parameters' dtype; valid until the next one is asked for.
    """
    own = {
        tuple(map(mapping.canonical_name, names)): value(tensor)
        for names, tensor in named_tensors(chunks, topology)
    }
    for bucket in _buckets(_exports(own, mapping, topology), bucket_bytes):
        tensors: list[tuple[str, torch.Tensor]] = []
        if bucket[0].stage == topology.pp_rank:
            mine = [own[entry.names] for entry in bucket]
            for name, full in _whole(bucket, mine, mapping, topology).items():
                tensors += mapping.to_hf(name, full)
        if topology.pp_size > 1:
            tensors = _broadcast(tensors, bucket, mapping, topology)
        yield from tensors


def _broadcast(
    tensors: list[tuple[str, torch.Tensor]],
    bucket: list[_Export],
    mapping: Mapping,
    topology: Topology,
) -> list[tuple[str, torch.Tensor]]:
    """The owning stage's tensors on every stage of the pipeline, in one flat message."""
    full_names = [name for entry in bucket for name in entry.names]
    names = [hf_name for name in full_names for hf_name in mapping.hf_targets(name)]
    shapes = [mapping.hf_shape(name) for name in names]
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for _, tensor in tensors])
    else:
        size = sum(_numel(shape) for shape in shapes)
        flat = torch.empty(size, dtype=bucket[0].dtype, device=topology.device)
    source = dist.get_global_rank(topology.pp_group, bucket[0].stage)
    dist.broadcast(flat, src=source, group=topology.pp_group)
    pieces = flat.split([_numel(shape) for shape in shapes])
    return [(n, p.view(s)) for n, p, s in zip(names, pieces, shapes, strict=True)]
