"""HF checkpoint -> Megatron distributed checkpoint, parameter by parameter.

The layout given decides the padding of the vocabulary, the pieces in which parameters are stored
and how they are spread over files; any other layout loads the same checkpoint.
"""

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from megatron_zero.checks import fail, round_up
from megatron_zero.convert import hf_dir
from megatron_zero.convert.dist_checkpoint import Chunk, save_chunk, write_metadata
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.mapping import CheckpointEntry, Mapping
from megatron_zero.convert.safetensors_io import SafetensorsSource, grouped
from megatron_zero.convert.sources import TensorSource
from megatron_zero.convert.stored import NUM_MTP, check_copies, hf_corrections
from megatron_zero.convert.streaming import OutputDirectory, prefetched
from megatron_zero.convert.tensors import take_rows
from megatron_zero.convert.verify import verify_conversion

MAX_FILE_BYTES = 512 * 2**20  # a conversion that is continued loses at most one file
MAX_CHUNK_BYTES = 64 * 2**20  # who needs a part of a chunk reads all of it

# By which rules Megatron names the keys: what a loader passes to `sharded_state_dict`.
CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}

Block = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes within a tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    name: str
    entry: CheckpointEntry
    dtype: torch.dtype
    blocks: list[Block]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(sizes) for _, sizes in self.blocks) * self.dtype.itemsize


def hf_to_megatron(
    hf: "str | Path",
    out: "str | Path",
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    dtype: str = "keep",
    drop_mtp: bool = False,
    verify: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> list[str]:
    """Convert an HF checkpoint into a Megatron distributed checkpoint that any layout loads.

    Args:
        hf: a folder, or a hub id, which is downloaded.
        out: must not exist, appears when it is whole; until then all is in `<out>.incomplete`.
            Holds config and tokenizer too, so that it can be a `model.path`.
        tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size: what
            the files are cut for.
        dtype: bf16, fp32 or keep.
        drop_mtp: leave out multi-token-prediction layers.
        verify: read back and compare, logits too where there is memory for both models.
        resume: continue `<out>.incomplete` if it is there.
        progress: show a bar on a terminal.

    Returns:
        What was written and, with `verify`, found: sentences.

    Raises:
        ValueError: bad input, by name; OSError: reading or writing failed; VerificationError.
    """
    sizes = (tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size)
    hf_dir.check_dtype(dtype)
    directory = hf_dir.local_directory(hf, "hf")
    config = hf_dir.read_config(directory)
    source = hf_dir.open_source(directory, config, dtype)
    corrections = hf_corrections(config, source, directory)
    mapping = _mapping(config | corrections.fields, *sizes, with_mtp=not drop_mtp)
    mapping.check_source(source)
    check_copies(mapping, source)
    files = _files(mapping, source, dtype, *sizes[:2])
    inputs = {"source": hf_dir.fingerprint(directory), "dtype": dtype, "layout": list(sizes)}
    inputs |= {"drop_mtp": drop_mtp}
    parameters = list(itertools.chain(*files.values()))
    total = sum(parameter.nbytes for parameter in parameters)
    with OutputDirectory(Path(out), inputs, total, resume=resume, progress=progress) as output:
        _write_all(output, files, mapping, source)
        _keep_assignment(directory, mapping, output.partial / hf_dir.HF_FILES)
        if dtype == "keep":
            _keep_dtypes(mapping, source, parameters, output.partial / hf_dir.HF_DTYPES)
        dropped = {NUM_MTP: 0} if drop_mtp and config.get(NUM_MTP) else {}
        hf_dir.carry_over(directory, output.partial, dtype, corrections.fields | dropped)
        verified = verify_conversion(mapping, output.partial, directory, dtype) if verify else []
        output.finish()
    written = f"{out}: {total / 1e9:.2f} GB in {len(files)} files"
    return [*corrections.notes, written, *verified]


def _keep_assignment(directory: Path, mapping: Mapping, path: Path) -> None:
    """Record which tensors each file of the original holds, for the way back."""
    known, stored = set(mapping.hf_names()), SafetensorsSource(directory, fp8=True).files()
    assigned = {file: [n for n in names if n in known] for file, names in stored.items()}
    path.write_text(json.dumps(assigned, indent=1) + "\n")


def _keep_dtypes(
    mapping: Mapping, source: TensorSource, parameters: Sequence[_Parameter], path: Path
) -> None:
    """Record the types of tensors that are stored wider here, for the way back; if there are any.

    A parameter that is made of tensors of several types, or shares its key with experts of
    another, has the widest of them.
    """
    widened = {}
    for parameter in parameters:
        for hf_name in mapping.hf_targets(parameter.name):
            if source.dtype(hf_name) != parameter.dtype:
                widened[hf_name] = str(source.dtype(hf_name)).removeprefix("torch.")
    if widened:
        path.write_text(json.dumps(widened, indent=1) + "\n")


def _mapping(
    config: dict[str, object], tp_size: int, pp_size: int, ep_size: int, *, with_mtp: bool
) -> Mapping:
    """The mapping with its vocabulary padded for `tp_size`; refuses sizes that do not divide."""
    dims = mapping_for(config).dims
    for kind, size, total, what in (
        ("tensor", tp_size, dims["num_attention_heads"], "attention heads"),
        ("pipeline", pp_size, dims["num_hidden_layers"], "layers"),
        ("expert", ep_size, dims.get("num_experts", 1), "experts"),
    ):
        valid = [n for n in range(1, total + 1) if total % n == 0]
        if size not in valid:
            listed = ", ".join(map(str, valid))
            fail(f"{kind}_model_parallel_size", size, f"{total} {what}: must be one of {listed}")
    padded_vocab_size = round_up(dims["vocab_size"], tp_size)
    mapping = mapping_for(config, padded_vocab_size, with_mtp=with_mtp)
    for name in mapping.megatron_names():
        try:
            mapping.shard_shape(name, tp_size)
        except ValueError as error:
            fail("tensor_model_parallel_size", tp_size, str(error))
    return mapping


def _files(
    mapping: Mapping, source: TensorSource, dtype: str, tp_size: int, pp_size: int
) -> dict[str, list[_Parameter]]:
    """All parameters by file, stage after stage; no file belongs to two stages."""
    dtypes = _key_dtypes(mapping, source, dtype)
    stages: dict[int, list[_Parameter]] = defaultdict(list)
    for name in mapping.megatron_names():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            stage = int(layer[1]) * pp_size // mapping.dims["num_hidden_layers"]
        else:
            stage = 0 if name.startswith("embedding.") else pp_size - 1
        chosen = dtypes[mapping.checkpoint_entry(name).key]
        stages[stage].append(_parameter(mapping, name, chosen, tp_size))
    return {
        f"stage{stage:03d}_{number:04d}.distcp": members
        for stage, held in stages.items()
        for number, members in enumerate(grouped(held, lambda p: p.nbytes, MAX_FILE_BYTES))
    }


def _key_dtypes(mapping: Mapping, source: TensorSource, dtype: str) -> dict[str, torch.dtype]:
    """The type to write of every key.

    A key has one type: of tensors of unlike ones that it joins (q, k and v; gate and up; the
    experts of a layer), the widest, which holds the values of all of them.
    """
    dtypes: dict[str, torch.dtype] = {}
    for name in mapping.megatron_names():
        parameter, key = mapping.parameter(name), mapping.checkpoint_entry(name).key
        for hf_name in parameter.hf_names:
            chosen = hf_dir.chosen_dtype(source.dtype(hf_name), dtype, parameter.float32)
            dtypes[key] = torch.promote_types(dtypes.get(key, chosen), chosen)
    return dtypes


def _parameter(mapping: Mapping, name: str, chosen: torch.dtype, tp_size: int) -> _Parameter:
    mapped = mapping.parameter(name)
    # Every rank holds its part of each block: of gate and of up, where they are stacked.
    parts = tp_size * mapped.kind.num_blocks
    blocks = list(_blocks(mapped.full_shape, chosen.itemsize, mapped.tp_dim, parts))
    entry = mapping.checkpoint_entry(name)
    return _Parameter(name=name, entry=entry, dtype=chosen, blocks=blocks)


def _blocks(
    shape: tuple[int, ...], itemsize: int, dim: Optional[int], parts: int
) -> Iterator[Block]:
    """The chunks of a tensor: `parts` along `dim`, and not too large ones along dim 0."""
    cuts = [[(0, length)] for length in shape]
    if dim is not None:
        step = shape[dim] // parts
        cuts[dim] = [(start, step) for start in range(0, shape[dim], step)]
    rows = max(MAX_CHUNK_BYTES // (itemsize * math.prod(cut[0][1] for cut in cuts[1:])), 1)
    cuts[0] = [
        (at, min(rows, start + length - at))
        for start, length in cuts[0]
        for at in range(start, start + length, rows)
    ]
    for ranges in itertools.product(*cuts):
        yield tuple(start for start, _ in ranges), tuple(length for _, length in ranges)


def _write_all(
    output: OutputDirectory,
    files: dict[str, list[_Parameter]],
    mapping: Mapping,
    source: TensorSource,
) -> None:
    """Write every file that is not there already, and the metadata."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    keys: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, members in files.items():
        places = output.finished(name) or _write(output, name, members, mapping, source)
        blocks = ((p, block) for p in members for block in p.blocks)
        for (p, block), place in zip(blocks, places, strict=True):
            chunks[p.entry.key].append(Chunk(*p.entry.within(*block), name, *place))
            keys[p.entry.key] = (p.entry.shape, p.dtype)
    write_metadata(output.partial, keys, chunks, CONTENT)


def _write(
    output: OutputDirectory,
    file_name: str,
    parameters: list[_Parameter],
    mapping: Mapping,
    source: TensorSource,
) -> list[tuple[int, int]]:
    """Write one file; start and length of every chunk in it."""
    tensors = (
        [rows.to(parameter.dtype) for rows in mapping.to_megatron_rows(parameter.name, source)]
        for parameter in parameters
    )
    file = output.create(file_name)
    places = []
    for parameter, pieces in zip(parameters, prefetched(tensors), strict=True):
        for offsets, sizes in parameter.blocks:
            rows = take_rows(pieces, offsets[0], offsets[0] + sizes[0])
            cut = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
            _, stored = parameter.entry.within(offsets, sizes)
            block = (piece[:, *cut] for piece in rows)
            places.append(save_chunk(stored, parameter.dtype, block, file))
    output.close(file, places)
    return places
