"""Rewards -> advantages, within each group of responses to one prompt."""

import torch

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
