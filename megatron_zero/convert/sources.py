"""Where tensors are read from: one protocol, so that files, memory and random weights look alike.

`read` takes a range of rows or columns because a training rank wants only its shard: an
implementation over files must not read the rest.
"""

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_zero.checks import UserError


class TensorSource(Protocol):
    """Named tensors whose slices can be read one at a time. Unknown names raise `ValueError`."""

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape, without reading the tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The type that `read` returns, without reading the tensor."""

    def origin(self, name: str) -> str:
        """Where a tensor is, to be put behind its name: " in <file>", or nothing in memory."""

    def read(self, name: str, *part: slice) -> torch.Tensor:
        """`tensor[part]`: all of it, or only a range of its rows (or all rows, but columns)."""


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def read_tensor(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that lies in a file from `offset` on, read into memory of its own.

    Raises:
        ValueError: the file ends before.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(tuple(shape), dtype=dtype)
    data = np.fromfile(path, np.uint8, num_bytes, offset=offset)
    if len(data) < num_bytes:
        raise UserError(f"{path} is damaged or not complete: it ends too early")
    return torch.from_numpy(data).view(dtype).view(tuple(shape))


def mapped(path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that lies in a file from `offset` on: pages of the file, read when they are used.

    It counts as this process's memory until it is dropped; what is written to it stays here. The
    file must not shrink meanwhile.

    Raises:
        ValueError: the file ends before.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = offset - first + count * dtype.itemsize
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)
        try:
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
        except ValueError as error:
            raise UserError(f"{path} is damaged or not complete: it ends too early") from error
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset - first).view(
        tuple(shape)
    )
