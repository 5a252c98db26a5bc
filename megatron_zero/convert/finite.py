"""Weights that are no numbers are refused where they are read, by tensor and file.

One NaN makes every logit NaN, and shows much later as something else: as an engine that disagrees
with the policy, or as a gradient that is not finite. Looking costs no second read and no memory.
"""

import torch

from megatron_zero.checks import UserError
from megatron_zero.convert.sources import TensorSource


def check_finite(tensor: torch.Tensor, label: str) -> None:
    """Refuse a tensor with a value that is NaN or infinite.

    Example:
        check_finite(torch.tensor([1.0, math.nan]), "tensor a in b.safetensors")

    Args:
        tensor: of any shape and floating type.
        label: what it is and where it is from.

    Raises:
        UserError: "<label> holds NaN or infinity, in 1 of 2 values: the weights are damaged".
    """
    if not tensor.numel() or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return
    # One pass at the memory's speed, without a tensor of flags; NaN is both least and greatest.
    least, greatest = torch.aminmax(tensor)
    if torch.isfinite(least) and torch.isfinite(greatest):
        return
    count = int((~torch.isfinite(tensor)).sum())
    values = f"in {count} of {tensor.numel()} values"
    raise UserError(f"{label} holds NaN or infinity, {values}: the weights are damaged")


class FiniteSource:
    """Another source, whose values are looked at when they are read.

    Raises:
        ValueError: from `read`, naming tensor and file.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def origin(self, name: str) -> str:
        return self._source.origin(name)

    def read(self, name: str, *part: slice) -> torch.Tensor:
        tensor = self._source.read(name, *part)
        check_finite(tensor, f"HF tensor {name}{self.origin(name)}")
        return tensor
