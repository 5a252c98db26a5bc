"""Weights in and out of the policy by HF name: each rank reads its shards, any rank gets the whole.

Export walks the parameters of the unsplit model in one order known to all ranks, a bounded bucket
at a time: the stage that owns a bucket gathers its tensor-parallel shards, turns them into HF
tensors, and the other stages receive those.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.sources import TensorSource
from megatron_zero.policy.model import PolicyModel, global_parameter_name
from megatron_zero.policy.parallel import Topology


def load(model: PolicyModel, mapping: Mapping, source: TensorSource, topology: Topology) -> None:
    """Fill this rank's stage, reading only its own shards.

    Raises:
        ValueError: from the mapping, naming the tensor.
    """
    mapping.check_source(source)
    with torch.no_grad():
        for name, param in model.named_parameters():
            shard = mapping.to_megatron_shard(
                global_parameter_name(name, model), source, topology.tp_rank, topology.tp_size
            )
            assert shard.shape == param.shape, f"{name}: {shard.shape} for {param.shape}"
            param.copy_(shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One parameter of the unsplit model: whose it is and how large."""

    name: str
    stage: int
    num_bytes: int  # of the full tensor


def _exports(model: PolicyModel, mapping: Mapping, topology: Topology) -> list[_Export]:
    """Every exported parameter, stage by stage; the same list on every rank."""
    exported = set(mapping.megatron_names())
    own = []
    for name, param in model.named_parameters():
        global_name = mapping.canonical_name(global_parameter_name(name, model))
        if global_name in exported:
            num_bytes = param.element_size() * _numel(mapping.full_shape(global_name))
            own.append(_Export(name=global_name, stage=topology.pp_rank, num_bytes=num_bytes))
    stages: list[list[_Export]] = [own]
    if topology.pp_size > 1:
        stages = [[] for _ in range(topology.pp_size)]
        dist.all_gather_object(stages, own, group=topology.pp_group)
    exports = [export for stage in stages for export in stage]
    missing = exported - {export.name for export in exports}
    assert not missing and len(exports) == len(exported), f"no stage owns {sorted(missing)}"
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
        if bucket and (size + export.num_bytes > bucket_bytes or export.stage != bucket[0].stage):
            yield bucket
            bucket, size = [], 0
        bucket.append(export)
        size += export.num_bytes
    if bucket:
        yield bucket


def _gather_shards(
    params: list[torch.Tensor], topology: Topology
) -> list[tuple[torch.Tensor, ...]]:
    """Per parameter, the shards of all tensor-parallel ranks: one collective for a bucket."""
    if topology.tp_size == 1:
        return [(param,) for param in params]
    flat = torch.cat([param.reshape(-1) for param in params])
    gathered = flat.new_empty(topology.tp_size * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=topology.tp_group)
    per_rank = [row.split([p.numel() for p in params]) for row in gathered.chunk(topology.tp_size)]
    return [
        tuple(shard.view(param.shape) for shard in shards)
        for param, *shards in zip(params, *per_rank, strict=True)
    ]


def export(
    model: PolicyModel,
    mapping: Mapping,
    topology: Topology,
    *,
    bucket_bytes: int,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF tensor, whole, on every rank; collective, so all ranks must exhaust it.

    Args:
        bucket_bytes: bound on the tensors in flight; about three times that is allocated.
        value: what is exported of each parameter: itself, or for instance its gradient.

    Yields:
        HF name and tensor in the parameters' dtype; valid until the next one is asked for.
    """
    own = {
        mapping.canonical_name(global_parameter_name(name, model)): value(param)
        for name, param in model.named_parameters()
    }
    for bucket in _buckets(_exports(model, mapping, topology), bucket_bytes):
        tensors: list[tuple[str, torch.Tensor]] = []
        if bucket[0].stage == topology.pp_rank:
            shards = _gather_shards([own[e.name] for e in bucket], topology)
            for entry, parts in zip(bucket, shards, strict=True):
                tensors += mapping.to_hf(entry.name, mapping.merge_shards(entry.name, parts))
        if topology.pp_size > 1:
            tensors = _broadcast(tensors, bucket, mapping, topology, own)
        yield from tensors


def _broadcast(
    tensors: list[tuple[str, torch.Tensor]],
    bucket: list[_Export],
    mapping: Mapping,
    topology: Topology,
    own: dict[str, torch.Tensor],
) -> list[tuple[str, torch.Tensor]]:
    """The owning stage's tensors on every stage of the pipeline, in one flat message."""
    names = [name for entry in bucket for name in mapping.hf_sources(entry.name)]
    shapes = [mapping.hf_shape(name) for name in names]
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for _, tensor in tensors])
    else:
        like = next(iter(own.values()))
        flat = like.new_empty(sum(_numel(shape) for shape in shapes))
    source = dist.get_global_rank(topology.pp_group, bucket[0].stage)
    dist.broadcast(flat, src=source, group=topology.pp_group)
    pieces = flat.split([_numel(shape) for shape in shapes])
    return [(n, p.view(s)) for n, p, s in zip(names, pieces, shapes, strict=True)]
