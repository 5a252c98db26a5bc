"""The objectives against literal float64 transcriptions of their formulas, values and gradients.

Nothing of `losses`, `advantages` or `batching` is used on the literal side: it loops over
responses and tokens as the papers write the sums.
"""

import dataclasses
import math

import pytest
import torch

from megatron_zero.advantages import group_advantages
from megatron_zero.batching import Packing, build_global_batch, build_samples
from megatron_zero.config import (
    AdvantageConfig,
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.losses import clipped_policy_loss, kl_estimate, truncated_importance_weights
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

MAX_RESPONSE = 12
CLIP = 0.2
P, G = 3, 4
ARMS = {  # normalize_std, length_normalizer
    "drgrpo": (False, "constant"),
    "grpo": (True, "response"),
    "std only": (True, "constant"),
    "length only": (False, "response"),
}


def run_config(normalize_std: bool, length_normalizer: str, **loss: float) -> RunConfig:
    return RunConfig(
        name="test",
        model=ModelConfig(path="unused"),
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(
            num_prompts_per_step=P, group_size=G, max_response_tokens=MAX_RESPONSE
        ),
        advantage=AdvantageConfig(normalize_std=normalize_std),
        loss=LossConfig(length_normalizer=length_normalizer, **loss),
        batch=BatchConfig(global_batch_size=P * G, max_tokens_per_microbatch=40),
    )


def rollout(seed: int = 0) -> tuple[list[RolloutGroup], list[list[Graded]]]:
    """Ragged responses, some truncated, one group without signal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    groups, graded = [], []
    for p in range(P):
        prompt = Prompt(
            index=p, text="q", token_ids=tuple(range(1, 3 + draw(0, 5))), answers=("1",)
        )
        responses, verdicts = [], []
        for i in range(G):
            length = draw(1, MAX_RESPONSE + 1)
            responses.append(
                Response(
                    token_ids=tuple(draw(0, 50) for _ in range(length)),
                    rollout_logprobs=tuple((-torch.rand(length, generator=generator) * 3).tolist()),
                    text="",
                    truncated=length == MAX_RESPONSE,
                    policy_version=0,
                )
            )
            reward = float(i % 2 == 0) if p else 1.0
            verdicts.append(
                Graded(reward=reward, correct=reward > 0, formatted=True, outcome="correct")
            )
        groups.append(RolloutGroup(prompt=prompt, responses=tuple(responses)))
        graded.append(verdicts)
    return groups, graded


def token_values(groups: list[RolloutGroup], seed: int) -> list[torch.Tensor]:
    """One value per response token, exact in float32: stand-ins for logprobs of some policy."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (-3 * torch.rand(len(r.token_ids), generator=generator)).double()
        for group in groups
        for r in group.responses
    ]


def literal_loss(
    groups: list[RolloutGroup],
    graded: list[list[Graded]],
    new: list[torch.Tensor],
    old: list[torch.Tensor],
    *,
    normalize_std: bool,
    length_normalizer: str,
    ref: "list[torch.Tensor] | None" = None,
    kl_coef: float = 0.0,
    rollout_logprobs: bool = False,
    cap: float = 0.0,
) -> tuple[torch.Tensor, float]:
    """Equation by equation, in float64; tensors only for the gradient with respect to `new`.

    Returns the loss and the same sum of absolute values: terms of both signs cancel in the loss, so
    that is the size its rounding is relative to.
    """
    magnitude = 0.0
    total = torch.zeros((), dtype=torch.float64)
    number = 0
    for group, verdicts in zip(groups, graded, strict=True):
        rewards = [v.reward for v in verdicts]
        mean = math.fsum(rewards) / len(rewards)
        variance = math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
        for response, reward in zip(group.responses, rewards, strict=True):
            advantage = reward - mean
            if normalize_std:
                advantage /= math.sqrt(variance) + 1e-8
            response_sum = torch.zeros((), dtype=torch.float64)
            absolute = 0.0
            for t in range(len(response.token_ids)):
                ratio = torch.exp(new[number][t] - old[number][t])
                clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
                term = -torch.minimum(ratio * advantage, clipped * advantage)
                if cap:
                    term = term * min(
                        math.exp(float(old[number][t]) - response.rollout_logprobs[t]), cap
                    )
                if ref is not None:
                    delta = ref[number][t] - new[number][t]
                    term = term + kl_coef * (torch.exp(delta) - delta - 1)
                response_sum = response_sum + term
                absolute += abs(term.item())
            length = MAX_RESPONSE if length_normalizer == "constant" else len(response.token_ids)
            magnitude += absolute / length
            total = total + response_sum / length
            number += 1
    return total / number, magnitude / number


def our_loss(
    config: RunConfig,
    groups: list[RolloutGroup],
    graded: list[list[Graded]],
    new: list[torch.Tensor],
    old: list[torch.Tensor],
    ref: "list[torch.Tensor] | None" = None,
    *,
    dp_size: int = 1,
    max_tokens: int = 40,
    alignment: int = 1,
) -> torch.Tensor:
    """The product's path in float32: advantages, packing, masks, denominators, per-token loss."""
    rewards = torch.tensor([[v.reward for v in row] for row in graded])
    advantages = group_advantages(rewards, normalize_std=config.advantage.normalize_std)
    samples = build_samples(groups, graded, advantages)
    total = torch.zeros(())
    for dp_rank in range(dp_size):
        packing = Packing(
            dp_rank=dp_rank, dp_size=dp_size, max_tokens=max_tokens, alignment=alignment
        )
        batch = build_global_batch(samples, config, packing, step=0)
        for minibatch in batch.minibatches:
            for microbatch in minibatch.microbatches:
                mask = microbatch.loss_mask
                if not microbatch.sample_index:
                    assert not mask.any()
                    continue

                def pick(values: list[torch.Tensor], chosen=microbatch.sample_index):
                    return torch.cat([values[i].float() for i in chosen])

                loss = clipped_policy_loss(
                    pick(new),
                    pick(old),
                    microbatch.advantages[mask],
                    clip_low=config.loss.clip_low,
                    clip_high=config.loss.clip_high,
                )
                if config.loss.importance_cap:
                    loss = loss * truncated_importance_weights(
                        pick(old), microbatch.rollout_logprobs[mask], cap=config.loss.importance_cap
                    )
                if ref is not None:
                    kl = kl_estimate(pick(new), pick(ref), kind="k3")
                    loss = loss + config.loss.kl_coef * kl
                total = total + (loss * microbatch.loss_weights[mask]).sum() / minibatch.denominator
    return total


def compare(ours: torch.Tensor, expected: tuple[torch.Tensor, float], ours_in, literal_in) -> float:
    """Largest relative difference of value and of the gradient with respect to every token."""
    literal, magnitude = expected
    ours.backward()
    literal.backward()
    worst = abs(ours.item() - literal.item()) / magnitude
    scale = max(t.grad.abs().max().item() for t in literal_in if t.grad is not None)
    for a, b in zip(ours_in, literal_in, strict=True):
        grad = torch.zeros_like(a) if a.grad is None else a.grad
        worst = max(worst, (grad - b.grad).abs().max().item() / scale)
    return worst


@pytest.fixture(params=list(ARMS))
def arm(request: pytest.FixtureRequest) -> tuple[bool, str]:
    return ARMS[request.param]


def with_grad(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [v.clone().requires_grad_() for v in values]


@pytest.mark.parametrize("layout", [(1, 1000, 1), (1, 24, 1), (2, 40, 1), (3, 24, 4)])
def test_objective_equals_the_literal_formula(arm, layout) -> None:
    dp_size, max_tokens, alignment = layout
    normalize_std, length_normalizer = arm
    groups, graded = rollout()
    old = token_values(groups, 1)
    noise = token_values(groups, 2)  # in [-3, 0]
    new = [(o + 0.2 * (n / 1.5 + 1)).float().double() for o, n in zip(old, noise, strict=True)]
    ours_in, literal_in = with_grad(new), with_grad(new)
    config = run_config(normalize_std, length_normalizer)
    ours = our_loss(
        config,
        groups,
        graded,
        ours_in,
        old,
        dp_size=dp_size,
        max_tokens=max_tokens,
        alignment=alignment,
    )
    literal = literal_loss(
        groups,
        graded,
        literal_in,
        old,
        normalize_std=normalize_std,
        length_normalizer=length_normalizer,
    )
    assert compare(ours, literal, ours_in, literal_in) <= 1e-6


def test_kl_term_and_importance_correction_equal_the_literal_formula(arm) -> None:
    normalize_std, length_normalizer = arm
    groups, graded = rollout(3)
    old = token_values(groups, 1)
    new, ref = ([(o + d).float().double() for o in old] for d in (0.1, -0.3))
    ours_in, literal_in = with_grad(new), with_grad(new)
    config = run_config(normalize_std, length_normalizer, kl_coef=0.05, importance_cap=2.0)
    ours = our_loss(config, groups, graded, ours_in, old, ref)
    literal = literal_loss(
        groups,
        graded,
        literal_in,
        old,
        normalize_std=normalize_std,
        length_normalizer=length_normalizer,
        ref=ref,
        kl_coef=0.05,
        cap=2.0,
    )
    assert compare(ours, literal, ours_in, literal_in) <= 1e-6


def test_the_arms_differ() -> None:
    """Were one arm computed for another, the tests above could not tell: so they must differ."""
    groups, graded = rollout()
    old = token_values(groups, 1)
    gradients = {}
    for name, (normalize_std, length_normalizer) in ARMS.items():
        new = with_grad(old)
        our_loss(run_config(normalize_std, length_normalizer), groups, graded, new, old).backward()
        gradients[name] = torch.cat([n.grad.flatten() for n in new if n.grad is not None])
    names = list(gradients)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (gradients[a] - gradients[b]).abs().max() > 1e-3, (a, b)


def test_masked_samples_count_in_the_denominator_but_have_no_gradient() -> None:
    groups, graded = rollout()
    old = token_values(groups, 1)
    rewards = torch.tensor([[v.reward for v in row] for row in graded])
    samples = build_samples(
        groups, graded, group_advantages(rewards, normalize_std=False), mask_truncated=True
    )
    truncated = [r.truncated for g in groups for r in g.responses]
    assert any(truncated) and [s.masked for s in samples] == truncated
    config = run_config(False, "constant")
    config = dataclasses.replace(
        config, batch=dataclasses.replace(config.batch, skip_zero_advantage=False)
    )
    packing = Packing(dp_rank=0, dp_size=1, max_tokens=1000)
    (minibatch,) = build_global_batch(samples, config, packing, step=0).minibatches
    assert minibatch.denominator == P * G * MAX_RESPONSE
    (microbatch,) = minibatch.microbatches
    trained = sum(len(o) for o, t in zip(old, truncated, strict=True) if not t)
    assert int(microbatch.loss_mask.sum()) == trained
    assert float(microbatch.loss_weights.sum()) == trained


def test_kl_estimators() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -90.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
    k1, k2, k3 = (kl_estimate(logprobs, ref, kind=k) for k in ("k1", "k2", "k3"))
    assert k1.tolist() == [0.5, -1.0, -40.0]  # clamped at 40
    assert k2.tolist() == [0.125, 0.5, 800.0]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1, math.exp(40) - 1 - 40]
    assert k3.tolist() == pytest.approx(expected, rel=1e-12)
    k3.sum().backward()
    assert logprobs.grad is not None and logprobs.grad[2] == 0  # beyond the clamp
    with pytest.raises(ValueError, match=r"loss\.kl_kind='k4'.*k1, k2, k3"):
        kl_estimate(logprobs, ref, kind="k4")


def test_clipping_by_hand() -> None:
    """Each of the four corners of the surrogate: value, and whether a gradient passes."""
    cases = [  # ratio, advantage, loss, gradient of the loss with respect to logprob
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.7, 0.0),
    ]
    for ratio, advantage, value, gradient in cases:
        logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        loss = clipped_policy_loss(
            logprob,
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([advantage], dtype=torch.float64),
            clip_low=0.3,
            clip_high=0.2,
        )
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert logprob.grad.item() == pytest.approx(gradient, rel=1e-12, abs=1e-15)


def test_group_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    plain = group_advantages(rewards, normalize_std=False)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [0.5, 0.5, -0.5, -0.5]]
    normalized = group_advantages(rewards, normalize_std=True)
    assert normalized[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-6)
    assert normalized[1].tolist() == [0.0] * 4
    std = math.sqrt(4 * 0.25 / 3)  # sample standard deviation: divided by G - 1
    assert normalized[2].tolist() == pytest.approx([0.5 / std] * 2 + [-0.5 / std] * 2, rel=1e-6)
    with pytest.raises(ValueError, match="must be"):
        group_advantages(rewards[0], normalize_std=False)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(rewards[:, :1], normalize_std=True)
