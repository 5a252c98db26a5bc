"""Weights stored in 8 bits with one scale per block, as DeepSeek-V3 publishes them.

`X` is float8_e4m3 and `X_scale_inv` holds a float32 for every block of `weight_block_size` rows
and columns, the last ones of a row or column possibly cut off: weight = X * scale.
"""

from collections.abc import Mapping

import torch

from megatron_zero.checks import UserError
from megatron_zero.convert.sources import TensorSource

SCALE = "_scale_inv"


def is_fp8_blocks(quantization: object) -> bool:
    """Whether a `quantization_config` describes this format."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return False
    block = quantization.get("weight_block_size")
    return isinstance(block, (list, tuple)) and len(block) == 2 and all(b > 0 for b in block)


class DequantizedSource:
    """A checkpoint with 8-bit blocks, read as `dtype`; the scales do not show.

    Args:
        source: the stored tensors.
        quantization: the config's `quantization_config`.
        dtype: what 8-bit tensors become; others keep theirs.
    """

    def __init__(
        self,
        source: TensorSource,
        quantization: Mapping[str, object],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        assert is_fp8_blocks(quantization)
        self._source, self._dtype = source, dtype
        rows, columns = quantization["weight_block_size"]  # type: ignore[misc]
        self._block = (int(rows), int(columns))
        names = set(source.names())
        self._scaled = {name for name in names if name + SCALE in names}
        scales = {name + SCALE for name in self._scaled}
        self._names = tuple(name for name in source.names() if name not in scales)

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._scaled else self._source.dtype(name)

    def origin(self, name: str) -> str:
        return self._source.origin(name)

    def read(self, name: str, *part: slice) -> torch.Tensor:
        stored = self._source.read(name, *part)
        if name not in self._scaled:
            return stored
        shape, scale = self.shape(name), self._source.read(name + SCALE)
        blocks = [-(-size // block) for size, block in zip(shape, self._block, strict=True)]
        if list(scale.shape) != blocks:
            shapes = f"has shape {list(scale.shape)}, expected {blocks}"
            raise UserError(f"HF tensor {name + SCALE} {shapes}")
        cuts = (*part, slice(None), slice(None))
        for d in (0, 1):
            positions = torch.arange(shape[d])[cuts[d]] // self._block[d]
            scale = scale.index_select(d, positions)
        return (stored.float() * scale.float()).to(self._dtype)
