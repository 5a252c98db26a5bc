"""A fresh model as a tensor source: the same weights in every layout, without communication.

Each HF tensor has its own generator, seeded by the run's seed and the tensor's name. Any rank can
make any tensor without the ones before it, and sharding happens after, as for a file.
"""

import hashlib

import torch

from megatron_zero.convert.hf_config import refuse
from megatron_zero.convert.mapping import Mapping


class RandomSource:
    """HF's initialisation: normal with `initializer_range`, zero biases, norms of one.

    Values are drawn in float32 and rounded to `dtype`, so dtypes differ by rounding only. The
    same torch build on the same kind of processor gives the same bits.

    Args:
        mapping: of the model to make.
        seed: of the run.
        dtype: of the tensors.
    """

    def __init__(self, mapping: Mapping, seed: int, dtype: torch.dtype = torch.float32) -> None:
        std = mapping.config["initializer_range"]
        if isinstance(std, bool) or not isinstance(std, (int, float)) or std < 0:
            refuse(f"initializer_range={std!r}", "must be a number from 0 up")
        self._mapping, self._seed, self._dtype, self._std = mapping, seed, dtype, float(std)

    def names(self) -> tuple[str, ...]:
        return self._mapping.hf_names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._mapping.hf_shape(name)

    def dtype(self, name: str) -> torch.dtype:
        self._mapping.hf_shape(name)  # refuses unknown names
        return self._dtype

    def origin(self, name: str) -> str:
        return ""

    def read(self, name: str, *part: slice) -> torch.Tensor:
        shape, init = self._mapping.hf_shape(name), self._mapping.hf_init(name)
        if init == "normal":
            generator = torch.Generator().manual_seed(_seed_of(self._seed, name))
            tensor = torch.empty(shape).normal_(0.0, self._std, generator=generator)
            tensor = tensor.to(self._dtype)
        else:
            tensor = torch.full(shape, float(init == "ones"), dtype=self._dtype)
        return tensor[part]


def _seed_of(seed: int, name: str) -> int:
    """63 bits that are the same in every process, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
