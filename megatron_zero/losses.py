"""The policy objective: pure functions of tensors and floats, per token.

Nothing here averages. Which tokens count, how much, and what the sum is divided by is decided in
`batching.py`; the sum is taken in `policy/forward.py`.
"""

import torch

MAX_LOG_RATIO = 40.0  # clamp of log-ratios in KL estimates (reference A5): exp stays finite


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """PPO's clipped surrogate, negated: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    r = exp(logprobs - old_logprobs). Schulman et al. 2017, equation 7; with equal bounds it is
    the surrogate of GRPO and Dr. GRPO (arXiv 2503.20783, section 3).

    Args:
        logprobs: [T] of the policy being trained, with gradient.
        old_logprobs: [T] of the policy before this rollout's first update, without gradient.
        advantages: [T].

    Returns:
        [T] loss of each token.

    Example:
        A = 1, r = 1.5, clip_high = 0.2: max(-1.5, -1.2) = -1.2, gradient 0.
        A = -1, r = 1.5, clip_high = 0.2: max(1.5, 1.2) = 1.5, gradient kept.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clip_fraction_terms(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """[T] bool: tokens whose gradient the clipping removed."""
    ratio = (logprobs - old_logprobs).exp()
    too_high = (ratio > 1.0 + clip_high) & (advantages > 0)
    too_low = (ratio < 1.0 - clip_low) & (advantages < 0)
    return too_high | too_low


def kl_estimate(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *, kind: str = "k3"
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's samples.

    With d = ref_logprobs - logprobs, clamped to ±40 (Schulman, "Approximating KL divergence"):
    k1 = -d (unbiased), k2 = d^2 / 2, k3 = expm1(d) - d (unbiased, never negative).

    Args:
        logprobs, ref_logprobs: [T].

    Raises:
        ValueError: unknown kind.
    """
    delta = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * delta * delta
    if kind == "k3":
        return torch.expm1(delta) - delta
    raise ValueError(f"loss.kl_kind={kind!r}: must be one of k1, k2, k3")


def truncated_importance_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """[T] min(exp(old_logprobs - rollout_logprobs), cap): corrects for the engine's own numerics.

    The engine samples from its probabilities, not from the trainer's; reference A5 (oat >= 0.2.1,
    C = 2). The paper's runs have no correction.
    """
    return (old_logprobs - rollout_logprobs).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)
