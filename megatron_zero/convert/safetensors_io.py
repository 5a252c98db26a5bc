"""HF checkpoints on disk: reading slices of safetensors files, and writing them in a stream.

Reading maps the files and copies only the slice asked for. Writing holds one file's tensors at a
time and gives the directory its name when everything is in it: a directory that exists is whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsSource:
    """The tensors of an HF directory: `model.safetensors`, or shards listed by an index file.

    A shard is opened when a tensor of it is asked for, so a pipeline stage maps only its own.

    Raises:
        ValueError: at construction if there is neither file, the index is malformed or a shard is
            missing; on first use of a shard if it is truncated or holds other tensors than the
            index says.
    """

    def __init__(self, directory: "str | Path") -> None:
        self._directory = Path(directory)
        self._files: dict[str, safe_open] = {}
        if (self._directory / SINGLE_NAME).is_file():
            file = self._files[SINGLE_NAME] = self._open(SINGLE_NAME)
            self._weight_map = dict.fromkeys(file.keys(), SINGLE_NAME)
        elif (self._directory / INDEX_NAME).is_file():
            self._weight_map = self._read_index()
        else:
            raise ValueError(f"{self._directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._weight_map)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._file(name).get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{name} in {self._directory} is {stored}, not one of {list(DTYPES)}")
        return DTYPES[stored]

    def read(
        self,
        name: str,
        dim: Optional[int] = None,
        start: Optional[int] = None,
        end: Optional[int] = None,
    ) -> torch.Tensor:
        self.dtype(name)  # refuses what is not a plain floating-point tensor
        if dim is None:
            return self._file(name).get_tensor(name)
        index = (slice(None),) * dim + (slice(start, end),)
        return self._file(name).get_slice(name)[index]

    def _read_index(self) -> dict[str, str]:
        path = self._directory / INDEX_NAME
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
        missing = [name for name in shards if not (self._directory / name).is_file()]
        if missing:
            raise ValueError(f"{self._directory} lacks shards {missing} that {INDEX_NAME} names")
        return weight_map

    def _file(self, name: str) -> safe_open:
        if name not in self._weight_map:
            raise ValueError(f"{self._directory} has no tensor {name!r}")
        shard = self._weight_map[name]
        if shard not in self._files:
            file = self._open(shard)
            listed = {key for key, value in self._weight_map.items() if value == shard}
            if set(file.keys()) != listed:
                differing = sorted(listed.symmetric_difference(file.keys()))
                raise ValueError(
                    f"{self._directory / shard} and {INDEX_NAME} disagree about {differing}"
                )
            self._files[shard] = file
        return self._files[shard]

    def _open(self, shard: str) -> safe_open:
        path = self._directory / shard
        try:
            return safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not complete: {error}") from error


def write_hf_checkpoint(
    directory: "str | Path",
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 4 * 1024**3,
    copy_files: Sequence["str | Path"] = (),
) -> int:
    """Write an HF checkpoint; `directory` appears at the end, complete.

    Until then everything is in `<directory>.incomplete`, which is removed on failure. At most one
    file's tensors are held, copied to the CPU as they arrive, so a producer may reuse its buffers.

    Args:
        directory: must not exist, or be empty.
        tensors: (hf name, tensor) in the order to store.
        max_shard_bytes: size from which a new file begins; a larger tensor gets its own file.
        copy_files: config and tokenizer files that belong inside.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: if the directory holds something, a name comes twice, there are no tensors or
            `max_shard_bytes` is not positive.
    """
    final = Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists already")
    partial = final.with_name(final.name + ".incomplete")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        total = _write_shards(partial, tensors, max_shard_bytes)
        for path in copy_files:
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
    for shard in _grouped(tensors, max_shard_bytes):
        save_file(shard, directory / str(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if not shards:
        raise ValueError(f"no tensors to write to {directory}")
    if len(shards) == 1:
        (directory / "0").rename(directory / SINGLE_NAME)
        return total
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / str(number)).rename(directory / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _grouped(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Own CPU copies of the tensors, in groups of at most `max_bytes` (or of one tensor)."""
    group: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name} was given twice")
        seen.add(name)
        if group and size + tensor.nbytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
    if group:
        yield group
