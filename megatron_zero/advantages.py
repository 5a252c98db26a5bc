"""Rewards -> advantages, within each group of responses to one prompt; all pure.

A group has no signal when its rewards are equal, and then its advantages are exactly 0: that is
what `batch.skip_zero_advantage`, `reward/no_signal_frac` and the warning of a run that learns
nothing go by. A floating-point mean of equal numbers need not be that number (eight times 0.7 in
float32 is not), and GRPO would divide the rounding error by a deviation of the same size. So a
group is first measured from its smallest reward, which leaves equal rewards at 0, and rewards of 0
and 1 as they are.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from megatron_zero.config import AdvantageConfig, RewardConfig
from megatron_zero.types import Graded, RolloutGroup

STD_EPS = 1e-8


def group_advantages(rewards: torch.Tensor, *, normalize_std: bool) -> torch.Tensor:
    """Reward minus the group's mean; GRPO also divides by the group's standard deviation.

    Dr. GRPO (arXiv 2503.20783, section 3.1) leaves the division out, because it weights prompts
    by difficulty: A_i = R_i - mean(R). The mean includes the response itself. GRPO divides by
    the sample standard deviation (Bessel's correction) + 1e-8 (reference A4).

    Args:
        rewards: [P, G] float.
        normalize_std: False for Dr. GRPO, True for GRPO.

    Returns:
        [P, G] in the dtype of `rewards`; exactly 0 for a group of equal rewards. The error is some
        roundings of the largest difference within the group, however large the rewards are.

    Raises:
        ValueError: not two-dimensional, or fewer than two responses to a prompt.

    Example:
        [[1, 0, 0, 0]] -> [[0.75, -0.25, -0.25, -0.25]], divided by 0.5 + 1e-8 for GRPO.
    """
    excess = _above_smallest(rewards, "group_mean")
    advantages = excess - excess.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (excess.std(dim=1, keepdim=True) + STD_EPS)
    return advantages.to(rewards.dtype)


def _above_smallest(rewards: torch.Tensor, baseline: str) -> torch.Tensor:
    """[P, G] rewards minus the group's smallest, in float32 at least.

    In less than float32 `STD_EPS` would be 0, and 0 / 0 no number.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: must be [prompts, group size]")
    if rewards.size(1) < 2:
        raise ValueError(f"advantage.baseline={baseline!r}: needs at least 2 responses per prompt")
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    return wide - wide.amin(dim=1, keepdim=True)


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Reward minus the mean of the *other* responses to the prompt: RLOO.

    A_i = R_i - 1 / (G - 1) * sum_{j != i} R_j (arXiv 2402.14740, the RLOO estimator; Kool et
    al. 2019). A baseline that does not hold the response's own reward leaves the gradient unbiased;
    it equals the advantage of `group_advantages` times G / (G - 1).

    Args:
        rewards: [P, G] float.

    Returns:
        [P, G] in the dtype of `rewards`; exactly 0 for a group of equal rewards.

    Raises:
        ValueError: not two-dimensional, or fewer than two responses to a prompt.

    Example:
        [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]].
    """
    excess = _above_smallest(rewards, "leave_one_out")
    others = excess.sum(dim=1, keepdim=True) - excess
    return (excess - others / (rewards.size(1) - 1)).to(rewards.dtype)


def advantage_function(config: AdvantageConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """[P, G] rewards -> [P, G] advantages, as `config` says."""
    if config.baseline == "leave_one_out":
        return leave_one_out_advantages
    return lambda rewards: group_advantages(rewards, normalize_std=config.normalize_std)


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> Fraction:
    """DAPO's soft overlong punishment, in [-1, 0] (arXiv 2503.14476, equation 13).

    0 up to `max_length - buffer` tokens, then falling by 1 / buffer with every token. The
    paper's last branch, -1 beyond the longest length, is never reached: generation stops there.

    Args:
        length: of a response, in tokens.
        max_length: L_max, the longest response that can be generated.
        buffer: L_cache, at least 1.

    Example (max_length 20, buffer 4):
        lengths 16, 17, 20 -> 0, -1/4, -1.
    """
    num_over = min(max(length - (max_length - buffer), 0), buffer)
    return Fraction(-num_over, buffer)


def training_rewards(
    groups: Sequence[RolloutGroup],
    graded: Sequence[Sequence[Graded]],
    reward: RewardConfig,
    *,
    max_length: int,
) -> torch.Tensor:
    """[P, G] float32: the verifier's rewards, less the overlong penalty where a run has one.

    With a penalty each is computed as a fraction of the decimal numbers that stand in the
    configuration and rounded once, so that what should be equal is equal: a correct answer that
    loses 3 * 1/3 and a wrong one that loses nothing both have 0.
    """
    if reward.overlong_buffer_tokens == 0:
        return torch.tensor([[verdict.reward for verdict in row] for row in graded])
    coefficient = Fraction(str(reward.overlong_penalty))
    rewards = []
    for group, row in zip(groups, graded, strict=True):
        shaped = []
        for response, verdict in zip(group.responses, row, strict=True):
            penalty = overlong_penalty(
                len(response.token_ids), max_length=max_length, buffer=reward.overlong_buffer_tokens
            )
            shaped.append(float(Fraction(str(verdict.reward)) + coefficient * penalty))
        rewards.append(shaped)
    return torch.tensor(rewards)


def less_kl(rewards: torch.Tensor, kl: torch.Tensor, coefficient: float) -> torch.Tensor:
    """[P, G] float64: rewards minus the weighted KL to the reference policy, of each response.

    Not in float32, where a KL of 1e-8 beside a reward of 1 would be lost and beside one of 0 would
    not, and GRPO's division by the deviation would make something of the difference.
    """
    return rewards.double() - coefficient * kl.double()


def groups_with_signal(advantages: torch.Tensor) -> list[bool]:
    """[P] whether the responses to each prompt differ in what training sees of them.

    Args:
        advantages: [P, G], as they are trained on: after every penalty.
    """
    return (advantages != 0).any(dim=1).tolist()
