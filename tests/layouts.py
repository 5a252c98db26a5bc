"""Layouts as short words, such as `tp2-sp-pp2-m100-f64-qwen2`: see `parse`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_zero.config import ParallelConfig

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


@dataclass(frozen=True)
class Case:
    """One layout with one model and one way of packing."""

    parallel: ParallelConfig
    max_tokens: int  # of a microbatch
    dtype: str
    samples: str  # tiny, reversed, math or long: see `tests.tiny`
    family: str  # of `tests.families`
    balance_coef: float  # of the experts' load


def parallel_of(words: Sequence[str]) -> ParallelConfig:
    """`tp2`, `pp2`, `vp2`, `cp2`, `ep2`, `etp2`; `sp`; `do` for the distributed optimizer."""
    settings: dict[str, object] = {
        SIZES[match[1]]: int(match[2])
        for word in words
        if (match := re.fullmatch(r"([a-z]+)(\d+)", word)) and match[1] in SIZES
    }
    settings["sequence_parallel"] = "sp" in words
    settings["use_distributed_optimizer"] = "do" in words
    return ParallelConfig(**settings)  # type: ignore[arg-type]


def parse(text: str) -> Case:
    """The words of `parallel_of`; `m100` tokens in a microbatch; `f64` or `bf16`, else float32;
    `reversed`, `math` or `long` samples; `balance` of experts; last, the family.
    """
    *words, family = text.split("-")
    (max_tokens,) = [int(word[1:]) for word in words if re.fullmatch(r"m\d+", word)]
    return Case(
        parallel=parallel_of(words),
        max_tokens=max_tokens,
        dtype="fp64" if "f64" in words else "bf16" if "bf16" in words else "fp32",
        samples=next((word for word in ("reversed", "math", "long") if word in words), "tiny"),
        family=family,
        balance_coef=0.5 if "balance" in words else 0.0,
    )
