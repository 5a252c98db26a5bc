"""Rewards -> advantages, within each group of responses to one prompt; all pure."""

from collections.abc import Callable, Sequence

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
        [P, G] in the dtype of `rewards`.

    Raises:
        ValueError: not two-dimensional, or fewer than two responses to normalise over.

    Example:
        [[1, 0, 0, 0]] -> [[0.75, -0.25, -0.25, -0.25]], divided by 0.5 + 1e-8 for GRPO.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: must be [prompts, group size]")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        if rewards.size(1) < 2:
            raise ValueError("advantage.normalize_std=True: needs at least 2 responses per prompt")
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPS)
    return advantages


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Reward minus the mean of the *other* responses to the prompt: RLOO.

    A_i = R_i - 1 / (G - 1) * sum_{j != i} R_j (arXiv 2402.14740, the RLOO estimator; Kool et
    al. 2019). A baseline that does not hold the response's own reward leaves the gradient unbiased;
    it equals the advantage of `group_advantages` times G / (G - 1).

    Args:
        rewards: [P, G] float.

    Raises:
        ValueError: fewer than two responses to a prompt.

    Example:
        [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]].
    """
    group_size = rewards.size(1)
    if group_size < 2:
        raise ValueError("advantage.baseline='leave_one_out': needs at least 2 responses")
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (group_size - 1)


def advantage_function(config: AdvantageConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """[P, G] rewards -> [P, G] advantages, as `config` says."""
    if config.baseline == "leave_one_out":
        return leave_one_out_advantages
    return lambda rewards: group_advantages(rewards, normalize_std=config.normalize_std)


def overlong_penalty(lengths: torch.Tensor, *, max_length: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment, in [-1, 0] (arXiv 2503.14476, equation 13).

    0 up to `max_length - buffer` tokens, then falling by 1 / buffer with every token. The
    paper's last branch, -1 beyond the longest length, is never reached: generation stops there.

    Args:
        lengths: response lengths in tokens, any shape.
        max_length: L_max, the longest response that can be generated.
        buffer: L_cache, at least 1.

    Example (max_length 20, buffer 4):
        lengths 16, 17, 20 -> 0, -0.25, -1.
    """
    over = (max_length - buffer - lengths) / buffer
    return over.clamp(-1.0, 0.0)


def training_rewards(
    groups: Sequence[RolloutGroup],
    graded: Sequence[Sequence[Graded]],
    reward: RewardConfig,
    *,
    max_length: int,
) -> torch.Tensor:
    """[P, G] float32: the verifier's rewards, less the overlong penalty where a run has one."""
    rewards = torch.tensor([[verdict.reward for verdict in row] for row in graded])
    if reward.overlong_buffer_tokens == 0:
        return rewards
    lengths = torch.tensor([[len(r.token_ids) for r in group.responses] for group in groups])
    buffer = reward.overlong_buffer_tokens
    penalty = overlong_penalty(lengths, max_length=max_length, buffer=buffer)
    return rewards + reward.overlong_penalty * penalty
