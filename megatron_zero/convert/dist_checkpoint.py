"""Megatron distributed checkpoints (`torch_dist`) as files, without Megatron: chunks of tensors.

    metadata.json   which format this is     .metadata   pickled: keys, shapes, places of chunks
    common.pt       what is no tensor        *.distcp    chunks, each as `torch.save` writes it

A key's tensor is cut into chunks; who loads reads the chunks that overlap with its own shard, so
the grid in which a checkpoint was written does not bind its readers.
"""

import functools
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.serialization
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data

from megatron_zero.checks import UserError
from megatron_zero.convert.mapping import Mapping, check_shape
from megatron_zero.convert.sources import mapped, raw_bytes

FORMAT_NAME, METADATA_NAME, COMMON_NAME = "metadata.json", ".metadata", "common.pt"
_NOTHING_NAME = "extra_state.distcp"
_MODEL_KEY = re.compile(r"(embedding|decoder|output_layer|mtp)\.")
_INERT = re.compile(r"megatron\.|nemo\.")
_TRUSTED = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.\w+"
    r"|torch\.distributed\.checkpoint\.filesystem\._Storage(Info|Prefix)"
    r"|torch\.distributed\.checkpoint\.planner\.(SavePlan|\w+WriteData|WriteItem(Type)?)"
    r"|torch\.(Size|device|bool|[a-z]+\d+\w*|serialization\._get_layout)"
    r"|collections\.(OrderedDict|defaultdict)|builtins\.(dict|list|set)|pathlib\.PosixPath"
)


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder holds a distributed checkpoint, of a run or of the conversion tools."""
    return (directory / FORMAT_NAME).is_file() and (directory / METADATA_NAME).is_file()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a key's tensor and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int  # bytes into the file
    length: int  # bytes, the wrapping of `torch.save` included


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter in a checkpoint: the key, and the leading indices (layer, expert) into it."""

    key: str
    index: tuple[int, ...]


class _Stub:
    """Stands for a class of Megatron that only Megatron needs."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` and nothing else: unpickling runs no code that a file brings along."""

    def find_class(self, module: str, name: str) -> Any:
        if _INERT.match(module):
            return _Stub
        if not _TRUSTED.fullmatch(f"{module}.{name}"):
            raise UserError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class CheckpointReader:
    """The tensors of a distributed checkpoint, read a piece at a time.

    Raises:
        ValueError: the directory is no `torch_dist` checkpoint, its metadata cannot be read, or a
            file is missing or too short.
    """

    def __init__(self, directory: "str | Path") -> None:
        self.directory = Path(directory)
        try:
            formats = json.loads((self.directory / FORMAT_NAME).read_text())
            if formats["sharded_backend"] != "torch_dist":
                raise UserError(f"its format is {formats['sharded_backend']!r}")
            with (self.directory / METADATA_NAME).open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            entries, stored = metadata.state_dict_metadata, metadata.storage_data
        except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            what = f"{self.directory} is no Megatron distributed checkpoint"
            raise UserError(f"{what}: {error}") from error
        self._entries = {
            k: v for k, v in entries.items() if isinstance(v, dcp.TensorStorageMetadata)
        }
        self.keys: Set[str] = self._entries.keys()
        self._chunks: dict[str, list[Chunk]] = defaultdict(list)
        for key, entry in self._entries.items():
            for chunk in entry.chunks:
                info = stored[dcp.MetadataIndex(key, chunk.offsets)]
                place = (info.relative_path, info.offset, info.length)
                self._chunks[key].append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *place))
        self._check_files()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def pieces(self, place: Place) -> list[torch.Tensor]:
        """A parameter in pieces, one after the other along dim 0, mapped where chunks allow it.

        Raises:
            ValueError: the stored chunks do not cover it, or a file is damaged.
        """
        depth = len(place.index)
        shape = self.shape(place.key)[depth:]
        bands: dict[tuple[int, int], list[Chunk]] = defaultdict(list)  # by first row and rows
        for chunk in self._chunks[place.key]:
            index = zip(place.index, chunk.offsets, chunk.sizes, strict=False)
            if all(o <= i < o + n for i, o, n in index):
                bands[chunk.offsets[depth], chunk.sizes[depth]].append(chunk)
        pieces = [self._join(bands[band], place, shape[1:]) for band in sorted(bands)]
        ends = itertools.accumulate(rows for _, rows in sorted(bands))
        follow = [first + rows for first, rows in sorted(bands)] == list(ends)
        held = itertools.chain(*bands.values())
        covered = sum(math.prod(chunk.sizes[depth:]) for chunk in held)
        if not follow or covered != math.prod(shape):
            raise UserError(f"{self.directory} holds {place.key} {list(place.index)} in part only")
        return pieces

    def _entry(self, key: str) -> dcp.TensorStorageMetadata:
        if key not in self._entries:
            raise UserError(f"{self.directory} lacks {key}")
        return self._entries[key]

    def _join(self, chunks: list[Chunk], place: Place, rest: tuple[int, ...]) -> torch.Tensor:
        """The rows that chunks, each with all of them, hold together, of `rest` each."""
        tensors = [self._map_chunk(chunk, place) for chunk in chunks]
        if len(chunks) == 1 and tensors[0].shape[1:] == rest:
            return tensors[0]
        joined = torch.empty((len(tensors[0]), *rest), dtype=tensors[0].dtype)
        for chunk, tensor in zip(chunks, tensors, strict=True):
            places = zip(chunk.offsets[len(place.index) + 1 :], tensor.shape[1:], strict=True)
            joined[:, *(slice(o, o + n) for o, n in places)] = tensor
        return joined

    def _map_chunk(self, chunk: Chunk, place: Place) -> torch.Tensor:
        """`chunk[place.index]`, counted from the start of the tensor; its bytes lie together."""
        path, dtype = self.directory / chunk.file, self.dtype(place.key)
        try:  # on the device "meta" torch reads type, shape and place, but no data
            with path.open("rb") as file:
                view = _create_file_view(file, chunk.start, chunk.length)
                stored = torch.load(view, map_location="meta", weights_only=True)
            begin: int = stored.untyped_storage()._checkpoint_offset
            fits = (tuple(stored.shape), stored.dtype) == (chunk.sizes, dtype)
        except (RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError):
            fits = False
        if not fits or not stored.is_contiguous() or stored.storage_offset():
            what = f"{dtype} tensor of {list(chunk.sizes)}"
            raise UserError(f"{path} is damaged: no {what} at byte {chunk.start}")
        number, sizes = 0, chunk.sizes[len(place.index) :]
        for i, o, n in zip(place.index, chunk.offsets, chunk.sizes, strict=False):
            number = number * n + i - o
        skipped = number * math.prod(sizes) * dtype.itemsize
        return mapped(path, chunk.start + begin + skipped, sizes, dtype)

    def _check_files(self) -> None:
        """Compare the size of every file with what it is said to hold."""
        ends: dict[str, int] = defaultdict(int)
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.length)
        for name, end in ends.items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{self.directory} lacks {name}, named in its metadata")
            if path.stat().st_size < end:
                raise UserError(f"{path} is damaged or not complete: it should have {end} bytes")


def locate(mapping: Mapping, name: str, reader: CheckpointReader) -> Place:
    """Where a checkpoint holds a parameter: a key per layer, or all layers stacked in one.

    Raises:
        ValueError: neither is there, or the shape is another.
    """
    entry = mapping.checkpoint_entry(name)
    index = () if entry.expert is None else (entry.expert,)
    layer = re.match(r"decoder\.layers\.(\d+)\.", entry.key)
    if entry.key in reader.keys or not layer:
        place, shape = Place(entry.key, index), entry.shape
    else:
        key = entry.key.replace(layer[0], "decoder.layers.")
        place = Place(key, (int(layer[1]), *index))
        shape = (mapping.dims["num_hidden_layers"], *entry.shape)
        if key not in reader.keys:
            raise UserError(f"{reader.directory} lacks {entry.key}")
    check_shape(f"{place.key} in {reader.directory}", reader.shape(place.key), shape)
    return place


def check_left_over(used: Iterable[str], reader: CheckpointReader) -> None:
    """Refuse a model that has parameters besides `used`; an optimizer's state may be there."""
    left = sorted(set(filter(_MODEL_KEY.match, reader.keys)) - set(used))
    if left:
        raise UserError(f"{reader.directory} has {', '.join(left[:5])}: no rule maps it")


class _Wrapping:
    """What `torch.save` writes before and after a tensor's data, which it is told to skip."""

    def __init__(self) -> None:
        self.parts = [b""]

    def write(self, data: memoryview) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        self.parts.append(b"")

    def flush(self) -> None:
        pass


@functools.cache
def _wrapping(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    wrapping = _Wrapping()
    # The checksum takes longer than everything else together, and no reader looks at it.
    with torch.utils.serialization.config.patch("save.compute_crc32", False), skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), wrapping)  # memory that is never touched
    before, after = wrapping.parts
    return before, after


def save_chunk(
    sizes: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[torch.Tensor], file: Any
) -> tuple[int, int]:
    """Append a chunk, its pieces along dim 0 one after the other; its start and length in bytes."""
    start = file.size
    before, after = _wrapping(sizes, dtype)
    file.write(before)
    for piece in pieces:
        file.write(raw_bytes(piece.contiguous()))
    file.write(after)
    return start, file.size - start


def write_metadata(
    directory: Path,
    keys: "dict[str, tuple[tuple[int, ...], torch.dtype]]",
    chunks: "dict[str, list[Chunk]]",
    content: dict[str, Any],
) -> None:
    """Everything but the chunks, as `megatron.core.dist_checkpointing.load` expects it.

    Linear layers also ask for an object `_extra_state`, which is empty without fp8.

    Args:
        directory: holds the chunks' files.
        keys: shape and type of every tensor.
        chunks: of every tensor, covering it.
        content: Megatron's `content_metadata`: by which rules the keys were made.
    """
    state: dict[str, Any] = {}
    storage = {}
    for key, (shape, dtype) in keys.items():
        blocks = []
        for c in chunks[key]:
            blocks.append(dcp.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)))
            storage[dcp.MetadataIndex(key, c.offsets)] = _StorageInfo(c.file, c.start, c.length)
        state[key] = dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype), torch.Size(shape), blocks
        )
    torch.save([None], directory / _NOTHING_NAME)
    nothing = _StorageInfo(_NOTHING_NAME, 0, (directory / _NOTHING_NAME).stat().st_size)
    for key in (key for name, (shape, _) in keys.items() for key in _extra_states(name, shape)):
        state[key], storage[dcp.MetadataIndex(key)] = dcp.BytesStorageMetadata(), nothing
    metadata = dcp.Metadata(
        state, storage_data=storage, storage_meta=dcp.StorageMeta(), version=CURRENT_DCP_VERSION
    )
    (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    torch.save({"content_metadata": content}, directory / COMMON_NAME)
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{kind}_version": 1 for kind in backends}
    (directory / FORMAT_NAME).write_text(json.dumps(backends | versions))


def _extra_states(key: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Keys of the `_extra_state` of the module that owns a weight; experts have one each."""
    module, _, parameter = key.rpartition(".")
    if parameter == "weight":
        count = shape[0] if ".experts.experts." in key else 1
        yield from (f"{module}._extra_state/shard_{i}_{count}" for i in range(count))
    if key.endswith(".self_attention.linear_proj.weight"):
        yield module.replace("linear_proj", "core_attention") + "._extra_state/shard_0_1"
