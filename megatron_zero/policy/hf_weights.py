"""Weights in and out of the policy by HF name: each rank reads its shards, any rank gets the whole.

Export walks the parameters of the unsplit model in one order known to all ranks, a bounded bucket
at a time: the stage that owns a bucket gathers its tensor-parallel shards, turns them into HF
tensors, and the other stages receive those.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist

from megatron_zero.checks import UserError
from megatron_zero.convert.finite import check_finite
from megatron_zero.convert.mapping import EXPERT, Mapping
from megatron_zero.convert.safetensors_io import grouped
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
    """Fill this rank's stage, reading only its own shards, and of those a replica's share.

    Replicas read in turn, parameter by parameter, and then give one another what they read: more of
    them do not read more from the storage, and each waits for less of it.

    Raises:
        ValueError: from the mapping, naming the tensor.
        UserError: from reading, naming tensor and file; the same on every rank.
    """
    mapping.check_source(source)
    problem = ""
    read: list[tuple[torch.Tensor, int, dist.ProcessGroup]] = []
    with torch.no_grad():
        for i, (names, param) in enumerate(named_tensors(chunks, topology)):
            own = names[topology.ep_rank if len(names) > 1 else 0]
            replicas = topology.edp_group if EXPERT.search(own) else topology.dp_cp_group
            reader = i % replicas.size()
            if replicas.rank() == reader:
                rank, size = _place(own, tuple(param.shape), mapping, topology)
                try:
                    shard = mapping.to_megatron_shard(own, source, rank, size)
                except ValueError as error:
                    problem = str(error)
                    break
                assert shard.shape == param.shape, f"{own}: {shard.shape} for {param.shape}"
                param.copy_(shard)
            read.append((param.detach(), reader, replicas))
        refuse_together(problem, topology)
        for tensor, reader, replicas in read:
            dist.broadcast(tensor, group_src=reader, group=replicas)


def refuse_together(problem: str, topology: Topology) -> None:
    """What one rank found wrong with the weights is said by all, for any may be the one heard.

    Collective: those that found nothing, and come with "", would else wait for one that has ended.

    Raises:
        UserError: the first rank's problem that is one.
    """
    problems = [""] * topology.world_size
    dist.all_gather_object(problems, problem, group=topology.host_group)
    for found in problems:
        if found:
            raise UserError(found)


def check_loaded(
    chunks: Sequence[PolicyModel], directory: Path, mapping: Mapping, topology: Topology
) -> None:
    """Refuse NaN and infinity in what Megatron loaded from a checkpoint; collective.

    Raises:
        UserError: naming the HF tensors that a parameter is made of; the same on every rank.
    """
    problem = ""
    for names, tensor in named_tensors(chunks, topology):
        own = names[topology.ep_rank if len(names) > 1 else 0]
        hf_names = " + ".join(mapping.hf_targets(own)) or own
        try:
            check_finite(tensor.detach(), f"{hf_names} in {directory}")
        except ValueError as error:
            problem = str(error)
            break
    refuse_together(problem, topology)


def _place(
    name: str, shape: tuple[int, ...], mapping: Mapping, topology: Topology
) -> tuple[int, int]:
    """Which of how many shards: TP's, or the experts' own; the only one of a whole parameter."""
    # TE's latent attention does not split its down projections; Megatron's own layers do.
    if shape == mapping.full_shape(name):
        return 0, 1
    if EXPERT.search(name):
        return topology.etp_rank, topology.etp_size
    return topology.tp_rank, topology.tp_size


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One parameter of a stage, and its size.

    Of an expert `all_names` are the names on each expert-parallel rank, one expert of each; they
    travel together, or where that were more than a bucket those of `owner` alone.
    """

    all_names: tuple[str, ...]
    owner: Optional[int]
    is_expert: bool
    stage: int
    num_bytes: int  # of the full tensors, all names together
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return self.all_names if self.owner is None else (self.all_names[self.owner],)


def _exports(
    own: dict[tuple[str, ...], torch.Tensor], mapping: Mapping, topology: Topology, max_bytes: int
) -> list[_Export]:
    """Every exported parameter, stage by stage; the same list on every rank."""
    exported = set(mapping.megatron_names())
    mine = []
    for names, tensor in own.items():
        size = tensor.element_size() * math.prod(mapping.full_shape(names[0]))
        alone = len(names) > 1 and size * len(names) > max_bytes
        mine += [
            _Export(
                all_names=names,
                owner=owner,
                is_expert=EXPERT.search(names[0]) is not None,
                stage=topology.pp_rank,
                num_bytes=size if alone else size * len(names),
                dtype=tensor.dtype,
            )
            for owner in (range(len(names)) if alone else [None])
            if names[0] in exported
        ]
    stages: list[list[_Export]] = [mine] * topology.pp_size
    dist.all_gather_object(stages, mine, group=topology.pp_group)
    exports = [export for stage in stages for export in stage]
    found = [name for export in exports for name in export.names]
    missing = exported - set(found)
    assert not missing and len(exported) == len(found), f"no stage owns {sorted(missing)}"
    return exports


def _buckets(exports: list[_Export], bucket_bytes: int) -> Iterator[list[_Export]]:
    """Neighbours that can travel in one message, at most `bucket_bytes` (or one larger tensor)."""

    def kind(export: _Export) -> tuple[object, ...]:
        return export.stage, export.is_expert, export.dtype, export.owner

    for _, alike in itertools.groupby(exports, kind):
        yield from grouped(alike, lambda export: export.num_bytes, bucket_bytes)


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
    size, group, owner = topology.tp_size, topology.tp_group, bucket[0].owner
    shapes = [mapping.full_shape(entry.names[0]) for entry in bucket]
    if bucket[0].is_expert:
        size, group = topology.etp_size, topology.etp_group
    if owner in (None, topology.ep_rank):
        gathered = _gather(own, size, group)
    else:
        gathered = [(own[0].new_empty(shape),) for shape in shapes]
    joined = [
        parts[0] if parts[0].shape == shape else mapping.merge_shards(entry.names[0], parts)
        for entry, shape, parts in zip(bucket, shapes, gathered, strict=True)
    ]
    everywhere = [(tensor,) for tensor in joined]
    if owner is None:
        everywhere = _gather(joined, len(bucket[0].names), topology.ep_group)
    else:
        for tensor in joined:
            dist.broadcast(tensor, group_src=owner, group=topology.ep_group)
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
    for bucket in _buckets(_exports(own, mapping, topology, bucket_bytes), bucket_bytes):
        tensors: list[tuple[str, torch.Tensor]] = []
        if bucket[0].stage == topology.pp_rank:
            mine = [own[entry.all_names] for entry in bucket]
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
        size = sum(map(math.prod, shapes))
        flat = torch.empty(size, dtype=bucket[0].dtype, device=topology.device)
    dist.broadcast(flat, group_src=bucket[0].stage, group=topology.pp_group)
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [(n, p.view(s)) for n, p, s in zip(names, pieces, shapes, strict=True)]
