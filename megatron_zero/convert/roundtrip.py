"""Whether two HF checkpoints hold the same tensors, bit by bit; the first difference by name."""

from pathlib import Path
from typing import Optional

import torch

from megatron_zero.convert.hf_dir import local_directory
from megatron_zero.convert.safetensors_io import SafetensorsSource

_BLOCK_ELEMENTS = 16 * 2**20
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def first_difference(hf: "str | Path", other: "str | Path") -> Optional[str]:
    """The first difference of the second checkpoint from the first, or None.

    Names, types and shapes are compared before any contents. Contents are compared as bits: NaN
    equals NaN, and 0 is not -0.

    Raises:
        ValueError: one of them is no HF checkpoint, or is damaged.
    """
    left = SafetensorsSource(local_directory(hf, "hf"))
    right = SafetensorsSource(local_directory(other, "other"))
    if unpaired := sorted(set(left.names()) ^ set(right.names())):
        where = "is missing in" if unpaired[0] in left.names() else "is only in"
        return f"tensor {unpaired[0]} {where} {other}"
    for name in left.names():
        if left.dtype(name) != right.dtype(name):
            return f"tensor {name}: dtype {left.dtype(name)} and {right.dtype(name)}"
        if left.shape(name) != right.shape(name):
            return f"tensor {name}: shape {list(left.shape(name))} and {list(right.shape(name))}"
    return next(filter(None, (_first_position(name, left, right) for name in left.names())), None)


def _first_position(name: str, left: SafetensorsSource, right: SafetensorsSource) -> Optional[str]:
    shape = left.shape(name)
    rows = max(_BLOCK_ELEMENTS // max(torch.Size(shape[1:]).numel(), 1), 1)
    for start in range(0, shape[0] if shape else 1, rows):
        part = (slice(start, start + rows),) if shape else ()
        ours, theirs = (source.read(name, *part) for source in (left, right))
        bits = _BITS[ours.element_size()]
        differs = ours.view(bits) != theirs.view(bits)
        if differs.any():
            position = tuple(int(i) for i in differs.nonzero()[0])
            where = [position[0] + start, *position[1:]] if shape else []
            values = f"{ours[position].item()!r} and {theirs[position].item()!r}"
            return f"tensor {name} at {where}: {values}"
    return None
