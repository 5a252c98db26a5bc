"""The one verb of weight sync, whatever carries the tensors."""

from collections.abc import Iterable
from typing import Protocol

import torch


class WeightSync(Protocol):
    """Brings the rollout engine onto the trainer's weights."""

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load all weights, given whole by HF name; returns when every engine is on `version`.

        Raises:
            RuntimeError: a tensor was missing or given twice, or an engine is on another version.
        """
