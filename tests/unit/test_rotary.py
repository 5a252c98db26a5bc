"""Stretched rotary positions: the same bits as transformers' for every setting that is taken."""

import math

import pytest
import torch

from megatron_zero.convert.hf_config import rope_settings
from megatron_zero.policy.rotary import attention_factor, stretched_frequencies
from tests import tiny

# The long contexts that Qwen2.5's and Qwen3's model cards describe, then each field by itself.
YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.7},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.0},
    {"factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 8.5, "beta_slow": 0.5},
    {"factor": 2.0, "original_max_position_embeddings": 640, "truncate": False},
    {"factor": 1.0, "original_max_position_embeddings": 64},
    {"factor": 3.0},  # of the model's own length
    {"factor": 3.0, "mscale": None, "mscale_all_dim": None, "attention_factor": None},
    # both borders of the ramp on one dim
    {"factor": 4.0, "original_max_position_embeddings": 2, "beta_fast": 9.0, "beta_slow": 8.0},
]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def theirs(config: dict) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor as transformers computes them."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    parsed = transformers.Qwen2Config(**known)
    return ROPE_INIT_FUNCTIONS[parsed.rope_parameters["rope_type"]](parsed)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("settings", YARN)
def test_yarn_has_the_bits_of_transformers(settings: dict, theta: float) -> None:
    block = {"rope_type": "yarn", "rope_theta": theta, **settings}
    config = tiny.hf_config(tied=False, rope_parameters=block)
    frequencies, factor = theirs(config)
    rope = rope_settings(config)
    assert torch.equal(stretched_frequencies(rope, 32), frequencies)
    assert attention_factor(rope) == factor


def test_the_older_spelling_is_the_same() -> None:
    old = tiny.hf_config(tied=False, rope_theta=1e6)
    del old["rope_parameters"]
    old["rope_scaling"] = {"type": "yarn", **YARN[0]}
    rope = rope_settings(old)
    frequencies, factor = theirs(old)
    assert torch.equal(stretched_frequencies(rope, 32), frequencies)
    assert attention_factor(rope) == factor == 0.1 * math.log(4.0) + 1.0


def test_llama3_is_that_of_transformers() -> None:
    block = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    config = tiny.hf_config(tied=False, rope_parameters=block)  # the original length: the model's
    frequencies, _ = theirs(config)
    torch.testing.assert_close(stretched_frequencies(rope_settings(config), 32), frequencies)


def test_nothing_is_stretched_by_default() -> None:
    assert stretched_frequencies(rope_settings(tiny.hf_config(tied=False)), 32) is None
