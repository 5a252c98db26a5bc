"""Tensors in memory as a `TensorSource`."""

from collections.abc import Mapping
from typing import Optional

import torch

from megatron_zero.convert.sources import take


class DictSource:
    """Tensors in memory, for instance a `state_dict()`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._get(name).dtype

    def read(
        self,
        name: str,
        dim: Optional[int] = None,
        start: Optional[int] = None,
        end: Optional[int] = None,
    ) -> torch.Tensor:
        return take(self._get(name), dim, start, end)

    def _get(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ValueError(f"there is no tensor {name!r} among the {len(self._tensors)} given")
        return self._tensors[name]
