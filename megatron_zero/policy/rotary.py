"""Rotary positions that are stretched beyond the training length: Llama 3's way, and YaRN.

Both are frequencies in the place of Megatron's own. YaRN also multiplies cosine and sine, and so
queries and keys alike, by an attention factor: its square scales the scores, which every attention
takes as its softmax scale, whichever kernel applies the rotation.
"""

import math
from typing import Optional

import torch

from megatron_zero.convert.hf_config import ORIGINAL_LENGTH, RopeSettings


def stretched_frequencies(rope: RopeSettings, head_dim: int) -> Optional[torch.Tensor]:
    """[head_dim / 2] rotary frequencies, float32; None where positions are not rescaled."""
    if rope.rope_type == "llama3":
        return llama3_frequencies(rope, head_dim)
    if rope.rope_type == "yarn":
        return yarn_frequencies(rope, head_dim)
    return None


def llama3_frequencies(rope: RopeSettings, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] rotary frequencies of Llama 3.1 and later, float32.

    Long wavelengths are stretched by `factor`, short ones kept, those between blended (HF's
    `_compute_llama3_parameters`). Megatron's own fixes all but the factor.
    """
    scaling = rope.scaling
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    turns = scaling[ORIGINAL_LENGTH] * inverse / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * inverse + (1 - kept) * inverse / scaling["factor"]


def yarn_frequencies(rope: RopeSettings, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] rotary frequencies of YaRN (arXiv 2309.00071), float32.

    Dims that turn more than `beta_fast` times within the original length are kept, those that turn
    less than `beta_slow` times are stretched by `factor`, with a ramp between the two dims (HF's
    `_compute_yarn_parameters`, whose roundings these are). `truncate` rounds the two outwards.
    """
    scaling, half = rope.scaling, head_dim // 2
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    kept, stretched = 1.0 / powers, 1.0 / (scaling["factor"] * powers)
    first = _dim_that_turns(scaling.get("beta_fast", 32), rope, head_dim)
    last = _dim_that_turns(scaling.get("beta_slow", 1), rope, head_dim)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    share_kept = 1 - ramp
    return stretched * (1 - share_kept) + kept * share_kept


def _dim_that_turns(num_turns: float, rope: RopeSettings, head_dim: int) -> float:
    """The pair of dims, as a real number, that turns so often within the original length."""
    turns = rope.scaling[ORIGINAL_LENGTH] / (num_turns * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))


def attention_factor(rope: RopeSettings) -> float:
    """By what YaRN multiplies cosine and sine: as written, or from `factor` and the mscales."""
    scaling = rope.scaling
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    mscale, over_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and over_all:
        return _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], over_all)
    return _mscale(scaling["factor"], 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
