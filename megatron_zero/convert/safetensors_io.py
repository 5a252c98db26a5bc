"""HF checkpoints on disk: reading slices of safetensors files, and writing them in a stream.

Reading takes plain reads of the slice asked for into memory of its own, or on request the pages of
the file themselves, tensor by tensor. Writing holds one file's tensors at a
time and gives the directory its name when everything is in it: a directory that exists is whole.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save_file

from megatron_zero.checks import UserError
from megatron_zero.convert.sources import mapped, read_tensor
from megatron_zero.hf_config import other_weights

T = TypeVar("T")
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = {dtype: name for name, dtype in DTYPES.items()}


class _Stored(NamedTuple):
    """Where a tensor is: `offset` counts from the start of the file, in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _stored_in(path: Path) -> dict[str, _Stored]:
    """The tensors of one safetensors file, its header read and compared with its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= size:
                raise UserError(f"{size} bytes do not hold the header")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if first != end or last < first:
                raise UserError(f"tensor {name} does not begin where the one before it ends")
            if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
                raise UserError(f"tensor {name} has {last - first} bytes for {dtype} {shape}")
            tensors[name], end = _Stored(path, dtype, shape, start + first), last
        if start + end != size:
            raise UserError(f"{size} bytes where the header says {start + end}")
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not complete: {error}") from error


def file_of(directory: Path, name: str) -> Path:
    """The file of a folder that holds a tensor, or the folder where its files do not tell."""
    if (directory / INDEX_NAME).is_file():
        weight_map = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return directory / weight_map.get(name, "")
    single = directory / SINGLE_NAME
    return single if single.is_file() else directory


class SafetensorsSource:
    """The tensors of an HF directory: `model.safetensors`, or shards listed by an index file.

    A shard is opened when a tensor of it is asked for, so a pipeline stage opens only its own.
    With `fp8` tensors may be stored in 8 bits; their scales are tensors of their own. With `mapped`
    whole tensors are what `sources.mapped` gives: for who drops them soon.

    Raises:
        ValueError: at construction if there is neither file, the index is malformed or a shard is
            missing; on first use of a shard if it is truncated or holds other tensors than the
            index says.
    """

    def __init__(self, directory: "str | Path", *, fp8: bool = False, mapped: bool = False) -> None:
        self._directory, self._mapped = Path(directory), mapped
        self._dtypes = DTYPES | ({"F8_E4M3": torch.float8_e4m3fn} if fp8 else {})
        self._files: dict[str, dict[str, _Stored]] = {}
        has_single, has_index = (
            (self._directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)
        )
        if has_single and has_index and SINGLE_NAME not in self._read_index().values():
            # transformers reads the one, vLLM the others
            both = f"both {SINGLE_NAME} and {INDEX_NAME}, which names other files"
            raise UserError(f"{self._directory} has {both}: remove what is not meant")
        if has_single:
            file = self._files[SINGLE_NAME] = _stored_in(self._directory / SINGLE_NAME)
            self._weight_map = dict.fromkeys(file, SINGLE_NAME)
        elif has_index:
            self._weight_map = self._read_index()
        else:
            neither = f"{self._directory} has neither {SINGLE_NAME} nor {INDEX_NAME}"
            raise UserError(f"{neither}{other_weights(self._directory)}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._weight_map)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._stored(name).dtype
        if stored not in self._dtypes:
            known = list(self._dtypes)
            raise UserError(f"{name} in {self._directory} is {stored}, not one of {known}")
        return self._dtypes[stored]

    def origin(self, name: str) -> str:
        return f" in {self._directory / self._weight_map[name]}"

    def files(self) -> dict[str, list[str]]:
        """The tensors of every file, in the order in which they are stored; opens them all."""
        first = {file: name for name, file in self._weight_map.items()}
        return {file: list(self._file(first[file])) for file in sorted(first)}

    def read(self, name: str, *part: slice) -> torch.Tensor:
        dtype, stored = self.dtype(name), self._stored(name)  # refuses what is no plain float
        shape, offset = list(stored.shape), stored.offset
        if not part and self._mapped:
            return mapped(stored.path, offset, shape, dtype)
        if part:
            first, last, _ = part[0].indices(shape[0])
            offset += first * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = max(last - first, 0)
        tensor = read_tensor(stored.path, offset, shape, dtype)
        return tensor[(slice(None), *part[1:])].contiguous() if part[1:] else tensor

    def _read_index(self) -> dict[str, str]:
        path = self._directory / INDEX_NAME
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of safetensors files: {error!r}") from error
        missing = [name for name in shards if not (self._directory / name).is_file()]
        if missing:
            raise UserError(f"{self._directory} lacks shards {missing} that {INDEX_NAME} names")
        return weight_map

    def _stored(self, name: str) -> _Stored:
        return self._file(name)[name]

    def _file(self, name: str) -> dict[str, _Stored]:
        if name not in self._weight_map:
            raise UserError(f"{self._directory} has no tensor {name!r}")
        shard = self._weight_map[name]
        if shard not in self._files:
            file = _stored_in(self._directory / shard)
            listed = {key for key, value in self._weight_map.items() if value == shard}
            if set(file) != listed:
                differing = sorted(listed.symmetric_difference(file))
                files = f"{self._directory / shard} and {INDEX_NAME}"
                raise UserError(f"{files} disagree about {differing}")
            self._files[shard] = file
        return self._files[shard]


def header_bytes(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with when these tensors follow, one after the other.

    Tensors of wider types must come first: readers map the file and want them aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        assert start % dtype.itemsize == 0, f"{name} is not aligned"
        offsets = [start, end]
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_hf_checkpoint(
    directory: "str | Path",
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 4 * 1024**3,
    copy_files: Sequence["str | Path"] = (),
) -> int:
    """Write an HF checkpoint; `directory` appears at the end, complete.

    Until then everything is in `<directory>.incomplete`, which is removed on failure. At most one
    file's tensors and the next one are held, copied to the CPU as they arrive, so a producer may
    reuse its buffers.

    Args:
        directory: must not exist, or be empty.
        tensors: (hf name, tensor) in the order to store.
        max_shard_bytes: size from which a new file begins; a larger tensor gets its own file.
        copy_files: config and tokenizer files that belong inside, and folders of such files.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: if the directory holds something, a name comes twice, there are no tensors or
            `max_shard_bytes` is not positive.
    """
    final = Path(directory)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists already")
    partial = final.with_name(final.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        total = _write_shards(partial, tensors, max_shard_bytes)
        for path in map(Path, copy_files):
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            else:
                shutil.copy(path, partial)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> int:
    """Fill `directory`; files get their names when their number is known."""
    shards: list[list[str]] = []
    total = 0
    for group in grouped(_copied(tensors), lambda item: item[1].nbytes, max_shard_bytes):
        shard = dict(group)
        save_file(shard, directory / str(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if not shards:
        raise UserError(f"no tensors to write to {directory}")
    files = dict(zip(file_names(len(shards)), shards, strict=True))
    for number, name in enumerate(files):
        (directory / str(number)).rename(directory / name)
    write_index(directory, files, total)
    return total


def file_names(count: int) -> list[str]:
    """What `count` files that hold a model together are called."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(directory: Path, files: dict[str, list[str]], num_bytes: int) -> None:
    """Say which file holds which tensor, where there are several."""
    if list(files) != [SINGLE_NAME]:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def grouped(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in order, in groups of at most `limit` bytes, or of one item."""
    group: list[T] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    if group:
        yield group


def _copied(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Own copies on the CPU; no name twice."""
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise UserError(f"tensor {name} was given twice")
        seen.add(name)
        yield name, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
