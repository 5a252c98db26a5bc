"""The first weight sync against the policy: which token disagrees, and the bounds by dtype."""

import math

import pytest

from megatron_zero import first_sync
from megatron_zero.config import MismatchConfig, ModelConfig, RunConfig
from megatron_zero.types import Prompt, Response, RolloutGroup


def group(index: int, logprobs: list[float]) -> RolloutGroup:
    response = Response(
        token_ids=tuple(range(50, 50 + len(logprobs))),
        rollout_logprobs=tuple(logprobs),
        text="",
        truncated=True,
        policy_version=0,
        engine_index=index % 2,
    )
    prompt = Prompt(index=index, text="", token_ids=(3, 4), answers=("",), source="problems")
    return RolloutGroup(prompt=prompt, responses=(response,))


GROUPS = [group(7, [-1.0, -2.0]), group(9, [-3.0, -0.5, -0.25])]


def test_equal_logprobs_agree() -> None:
    policy = {0: [-1.0, -2.0], 1: [-3.0, -0.5, -0.25]}
    said = first_sync.compare(GROUPS, policy, max_kl=1e-300)
    assert (
        said == "engine and policy agree on 5 tokens: KL 0.0e+00, largest difference of a logprob 0"
    )


def test_the_bound_is_the_mean_of_k3_and_the_worst_token_is_named() -> None:
    policy = {0: [-1.0, -2.0], 1: [-3.0, -0.25, -0.25]}  # one token off by 0.25
    kl = (math.expm1(0.25) - 0.25) / 5
    assert "agree on 5 tokens" in first_sync.compare(GROUPS, policy, max_kl=kl * (1 + 1e-12))
    with pytest.raises(RuntimeError) as error:
        first_sync.compare(GROUPS, policy, max_kl=kl * (1 - 1e-12))
    text = str(error.value)
    assert f"KL(engine || policy) is {kl:.3g} on 5 tokens, above mismatch.max_first_kl=" in text
    assert "and 1 of them are above it by themselves" in text
    assert "difference of a logprob 0.25, at token 2 of 3 of the response to prompt 9 of" in text
    assert "of 'problems' (token id 51, engine 1: -0.5000, policy: -0.2500)" in text


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_what_is_no_number_disagrees(value: float) -> None:
    policy = {0: [-1.0, -2.0], 1: [-3.0, value, -0.25]}
    with pytest.raises(RuntimeError, match=r"difference of a logprob inf, at token 2 of 3"):
        first_sync.compare(GROUPS, policy, max_kl=0.005)


@pytest.mark.parametrize(
    ("dtype", "mismatch", "bounds"),
    [
        ("fp32", MismatchConfig(), (1e-6, 1e-8)),
        ("bf16", MismatchConfig(), (0.02, 0.005)),
        ("fp32", MismatchConfig(max_kl=0.5), (0.5, 1e-8)),
        ("bf16", MismatchConfig(max_first_kl=0.5), (0.02, 0.5)),
    ],
)
def test_the_bounds_follow_the_dtype_unless_they_are_given(dtype, mismatch, bounds) -> None:
    config = RunConfig(name="x", model=ModelConfig(path="x", dtype=dtype), mismatch=mismatch)
    assert (config.max_mismatch_kl, config.max_first_mismatch_kl) == bounds


def test_negative_bounds_are_refused() -> None:
    for name in ("max_kl", "max_first_kl"):
        with pytest.raises(ValueError, match=rf"mismatch\.{name}=-1.0: must be at least 0"):
            MismatchConfig(**{name: -1.0})
