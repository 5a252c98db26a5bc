"""Megatron distributed checkpoint -> HF checkpoint, tensor by tensor, from any layout.

Reads what `to_megatron` writes and what training saves. A file's header comes first, since all
shapes are known; its tensors follow in order.
"""

import json
import math
import re
from pathlib import Path
from typing import Optional

import torch

from megatron_zero.checks import fail
from megatron_zero.convert import hf_dir
from megatron_zero.convert.dist_checkpoint import (
    CheckpointReader,
    check_left_over,
    is_checkpoint,
    locate,
)
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.finite import check_finite
from megatron_zero.convert.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    file_names,
    grouped,
    header_bytes,
    write_index,
)
from megatron_zero.convert.sources import raw_bytes
from megatron_zero.convert.stored import megatron_corrections
from megatron_zero.convert.streaming import OutputDirectory, prefetched
from megatron_zero.convert.verify import verify_conversion
from megatron_zero.step_names import step_name, steps_in

DEFAULT_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class MegatronTensors:
    """The HF tensors of a Megatron checkpoint, converted as they are asked for.

    Args:
        directory: the checkpoint.
        hf_config: its model's `config.json`.
        dtype: bf16, fp32 or keep.

    Attributes:
        mapping: of the model that the checkpoint holds.
        corrections: where that is not the model of `hf_config`.

    Raises:
        ValueError: parameters are missing, left over or of another shape.
    """

    def __init__(self, directory: Path, hf_config: "dict[str, object]", dtype: str) -> None:
        self._reader = CheckpointReader(directory)
        padded_vocab_size = self._reader.shape("embedding.word_embeddings.weight")[0]
        self.corrections = megatron_corrections(hf_config, self._reader.keys, directory)
        self.mapping = mapping_for(hf_config | self.corrections.fields, padded_vocab_size)
        names = self.mapping.megatron_names()
        self._places = {name: locate(self.mapping, name, self._reader) for name in names}
        check_left_over((place.key for place in self._places.values()), self._reader)
        self._origin = {hf: name for name in names for hf in self.mapping.hf_targets(name)}
        self._dtype = dtype
        self._narrower: dict[str, torch.dtype] = {}  # that the original had, by HF name
        widened = directory / hf_dir.HF_DTYPES
        if dtype == "keep" and widened.is_file():
            for hf_name, stored in json.loads(widened.read_text()).items():
                self._narrower[hf_name] = getattr(torch, stored)

    def dtype(self, hf_name: str) -> torch.dtype:
        if hf_name in self._narrower:
            return self._narrower[hf_name]
        name = self._origin[hf_name]
        stored = self._reader.dtype(self._places[name].key)
        return hf_dir.chosen_dtype(stored, self._dtype, self.mapping.parameter(name).float32)

    def nbytes(self, hf_name: str) -> int:
        return math.prod(self.mapping.hf_shape(hf_name)) * self.dtype(hf_name).itemsize

    def read(self, hf_name: str) -> list[torch.Tensor]:
        """One HF tensor in pieces, one after the other along dim 0."""
        name = self._origin[hf_name]
        pieces = self.mapping.to_hf_rows(name, self._reader.pieces(self._places[name]))[hf_name]
        for piece in pieces:
            check_finite(piece, f"HF tensor {hf_name} in {self._reader.directory}")
        return [piece.to(self.dtype(hf_name)).contiguous() for piece in pieces]


def megatron_to_hf(
    megatron: "str | Path",
    out: "str | Path",
    *,
    dtype: str = "keep",
    max_shard_size: Optional[str] = None,
    hf_config: "Optional[str | Path]" = None,
    verify: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> list[str]:
    """Convert a Megatron distributed checkpoint, a training checkpoint too, into an HF one.

    Args:
        megatron: the folder with `metadata.json` and `.metadata`; from any layout. Or a run's
            directory, or its `checkpoints`, where only one checkpoint is in it.
        out: must not exist, appears when it is whole; until then all is in `<out>.incomplete`.
        dtype: bf16, fp32 or keep.
        max_shard_size: of a file, such as 5GB. None: files as in the original where it is known.
        hf_config: a folder or hub id with config and tokenizer. None: they are beside the weights
            or in the run's `model` folder.
        verify, resume, progress: see `hf_to_megatron`.

    Returns, Raises: see `hf_to_megatron`.
    """
    hf_dir.check_dtype(dtype)
    directory = _checkpoint_dir(Path(megatron).expanduser())
    model_dir = _model_dir(directory, hf_config)
    tensors = MegatronTensors(directory, hf_dir.read_config(model_dir), dtype)
    files = _files(tensors, directory, max_shard_size)
    inputs = {
        "source": hf_dir.fingerprint(directory),
        "model files": hf_dir.fingerprint(model_dir),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
    }
    total = sum(map(tensors.nbytes, tensors.mapping.hf_names()))
    with OutputDirectory(Path(out), inputs, total, resume=resume, progress=progress) as output:
        for file_name, names in files.items():
            if output.finished(file_name) is None:
                _write(output, file_name, names, tensors)
        write_index(output.partial, files, total)
        hf_dir.carry_over(model_dir, output.partial, dtype, tensors.corrections.fields)
        sides = (tensors.mapping, directory, output.partial)
        verified = verify_conversion(*sides, dtype) if verify else []
        output.finish()
    written = f"{out}: {total / 1e9:.2f} GB in {len(files)} files"
    return [*tensors.corrections.notes, written, *verified]


def _checkpoint_dir(given: Path) -> Path:
    """The checkpoint meant by a folder: itself, or the only one of a run or its `checkpoints`.

    Raises:
        ValueError: there is none, or there are several, which are listed.
    """
    if not given.is_dir():
        fail("megatron", str(given), "no such folder")
    if is_checkpoint(given) or any(given.glob("*.distcp")):  # an incomplete one is named as such
        return given
    steps = []
    for folder in (given / "checkpoints", given):
        # a copy, or one that is being written, is meant only when it is named
        found = [folder / step_name(step) for step in steps_in(folder)]
        steps += [path for path in found if is_checkpoint(path)]
    if len(steps) == 1:
        return steps[0]
    if steps:
        listed = ", ".join(map(str, steps))
        fail("megatron", str(given), f"holds {len(steps)} checkpoints: give one of {listed}")
    if (given / SINGLE_NAME).is_file() or (given / INDEX_NAME).is_file():
        fail("megatron", str(given), "is an HF checkpoint already")
    wanted = "a folder with metadata.json and .metadata, or a run's directory with a checkpoint"
    fail("megatron", str(given), f"holds no Megatron checkpoint: must be {wanted}")


def _model_dir(directory: Path, hf_config: "Optional[str | Path]") -> Path:
    """Where config and tokenizer are: as told, beside the weights, or in the run's `model`."""
    if hf_config is not None:
        return hf_dir.local_directory(hf_config, "hf_config")
    candidates = [directory, directory.resolve().parent.parent / "model"]
    found = [path for path in candidates if (path / "config.json").is_file()]
    if not found:
        where = " or ".join(map(str, candidates))
        fail("hf_config", None, f"must be given (--hf-config): no config.json in {where}")
    return found[0]


def _files(
    tensors: MegatronTensors, directory: Path, max_shard_size: Optional[str]
) -> dict[str, list[str]]:
    """Tensors by file: as the original had them where that is known, else by size."""
    known, names = directory / hf_dir.HF_FILES, tensors.mapping.hf_names()
    if max_shard_size is None and known.is_file():
        files: dict[str, list[str]] = json.loads(known.read_text())
        if {name for file in files.values() for name in file} == set(names):
            return {file: _by_width(tensors, listed) for file, listed in files.items() if listed}
    limit = num_bytes(max_shard_size or DEFAULT_SHARD_SIZE)
    groups = list(grouped(names, tensors.nbytes, limit))
    named = zip(file_names(len(groups)), groups, strict=True)
    return {label: _by_width(tensors, group) for label, group in named}


def num_bytes(size: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        fail("max_shard_size", size, "must be a size such as 5GB or 500MB")
    return count


def _by_width(tensors: MegatronTensors, names: list[str]) -> list[str]:
    """Wider types first, as the format wants it, else in the same order."""
    return sorted(names, key=lambda name: -tensors.dtype(name).itemsize)


def _write(
    output: OutputDirectory, file_name: str, names: list[str], tensors: MegatronTensors
) -> None:
    file = output.create(file_name)
    file.write(header_bytes([(n, tensors.dtype(n), tensors.mapping.hf_shape(n)) for n in names]))
    for pieces in prefetched(map(tensors.read, names)):
        for piece in pieces:
            file.write(raw_bytes(piece))
    output.close(file, True)
