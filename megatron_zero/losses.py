"""The policy objective: pure functions of tensors and floats, per token.

Nothing here averages over tokens or responses. Which tokens count, how much, and what the sum is
divided by is decided in `batching.py`, before the first forward pass. A new algorithm is a new
function here, and a branch in `_surrogate`; `policy_objective` adds up what a run has switched on.

Shapes: R rows, the tokens of a microbatch that the loss sees, response after response in packed
order; S sequences, of which `response_lengths` [S] int64 counts the rows.
"""

from collections.abc import Callable
from typing import Optional

import torch
import torch.distributed as dist

from megatron_zero.config import LossConfig
from megatron_zero.types import TokenRows

Sums = dict[str, torch.Tensor]
# rows -> (loss summed over the rows, not yet divided; values to sum; values to take the maximum of)
Objective = Callable[[TokenRows], tuple[torch.Tensor, Sums, Sums]]

MAX_LOG_RATIO = 40.0  # clamp of log-ratios in KL estimates (reference A5): exp stays finite


def response_sums(
    values: torch.Tensor, response_lengths: torch.Tensor, group: Optional[dist.ProcessGroup] = None
) -> torch.Tensor:
    """[R] for every row, the sum of `values` over all rows of its response; without gradient.

    The only place where rows of one response meet, in float64 whatever the rows are in.

    Args:
        response_lengths: [S] rows of each response on this rank.
        group: of the ranks that have the other rows (context parallelism); None: there are none.

    Example:
        values [1, 2, 4], response_lengths [2, 0, 1] -> [3, 3, 4].
    """
    totals = torch.segment_reduce(
        values.detach().double(), "sum", lengths=response_lengths, initial=0.0
    )
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals.repeat_interleave(response_lengths, output_size=len(values)).to(values.dtype)


def response_means(
    values: torch.Tensor, response_lengths: torch.Tensor, group: Optional[dist.ProcessGroup] = None
) -> torch.Tensor:
    """[R] for every row, the mean of `values` over its response; without gradient."""
    counts = response_sums(torch.ones_like(values), response_lengths, group)
    return response_sums(values, response_lengths, group) / counts


def _clipped(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float
) -> torch.Tensor:
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """PPO's clipped surrogate, negated: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    r = exp(logprobs - old_logprobs). Schulman et al. 2017 (arXiv 1707.06347), equation 7; with
    equal bounds it is the surrogate of GRPO and Dr. GRPO (arXiv 2503.20783, section 3), with a
    higher upper one DAPO's clip-higher (arXiv 2503.14476, equation 10).

    Args:
        logprobs: [R] of the policy being trained, with gradient.
        old_logprobs: [R] of the policy before this rollout's first update, without gradient.
        advantages: [R].

    Returns:
        [R] loss of each token.

    Example:
        A = 1, r = 1.5, clip_high = 0.2: max(-1.5, -1.2) = -1.2, gradient 0.
        A = -1, r = 1.5, clip_high = 0.2: max(1.5, 1.2) = 1.5, gradient kept.
    """
    log_ratio = logprobs - old_logprobs
    return _clipped(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)


def gspo_loss(
    logprobs: torch.Tensor,
    mean_log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """GSPO: the clipped surrogate with one ratio for a whole response, negated.

    s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|), the geometric mean of the tokens' ratios
    (arXiv 2507.18071, equation 7), in -min(s_i A_i, clip(s_i) A_i) (equation 5). Written per
    token as GSPO-token does (equations 13 and 14),

        s_it = sg[s_i] * pi(y_it) / sg[pi(y_it)],

    which has the value s_i at every token. Averaged over the response
    (`loss.length_normalizer=response`) that is equation 5 in value and, all tokens of a response
    having one advantage, in gradient; and no gradient passes between tokens.

    Args:
        logprobs, advantages, clip_low, clip_high: as in `clipped_policy_loss`.
        mean_log_ratio: [R] log s_i at every token of response i, without gradient:
            `response_means` of logprobs - old_logprobs.

    Returns:
        [R] loss of each token.
    """
    log_ratio = mean_log_ratio + (logprobs - logprobs.detach())  # the second term is exactly 0
    return _clipped(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)


def cispo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """CISPO: -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob.

    arXiv 2506.13585 (MiniMax-M1), equations 4 and 5: the importance weight is clipped instead of
    the update, so that every token keeps a gradient. The paper has no lower bound, clip_low = 1.

    Args, Returns: as in `clipped_policy_loss`.

    Example:
        A = 1, r = 1.5, clip_high = 0.2: gradient -1.2, where PPO's is 0.
    """
    weight = (logprobs.detach() - old_logprobs).exp().clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages * logprobs


def reinforce_loss(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE: -A logprob, [R]; on-policy only. RLOO's estimator (arXiv 2402.14740)."""
    return -advantages * logprobs


def clip_fraction_terms(
    log_ratio: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float
) -> torch.Tensor:
    """[R] bool: tokens whose gradient the clipping removed."""
    ratio = log_ratio.exp()
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
        logprobs, ref_logprobs: [R].

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
    """[R] min(exp(old_logprobs - rollout_logprobs), cap): corrects for the engine's own numerics.

    The engine samples from its probabilities, not from the trainer's; reference A5 (oat >= 0.2.1,
    C = 2). The paper's runs have no correction. Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training".
    """
    return (old_logprobs - rollout_logprobs).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def truncated_sequence_weights(log_ratio: torch.Tensor, *, cap: float) -> torch.Tensor:
    """[R] min(prod_t exp(old_logprobs - rollout_logprobs), cap), one weight per response.

    The ratio of the whole response's probabilities, so unbiased but for the cap; Liu, Li et al.
    2025, "When speed kills stability", section 4.2.1 (Seq-TIS).

    Args:
        log_ratio: [R] `response_sums` of old_logprobs - rollout_logprobs.
    """
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def sequence_mask(log_ratio: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """[R] bool: rows of responses whose ratio of policy to engine is within [low, high].

    A response that the policy itself would hardly have drawn says nothing about it, and is left
    out whole. With rho_t = exp(old_logprobs - rollout_logprobs) the ratio is prod_t rho_t
    (`product`: with low = 0 and `truncated_sequence_weights` of the same bound that is Seq-MIS,
    rho 1{rho <= C}, source as there), or (prod_t rho_t)^(1 / |y|) (`geometric`), which does not
    depend on length.

    Args:
        log_ratio: [R] `response_sums`, or `response_means`, of old_logprobs - rollout_logprobs.
    """
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    return (ratio >= low) & (ratio <= high)


def _surrogate(loss: LossConfig, rows: TokenRows) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] loss of each token, and as [R] bool the tokens on which the bounds acted."""
    bounds = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    log_ratio = rows.logprobs.detach() - rows.old_logprobs
    if loss.surrogate == "reinforce":
        return reinforce_loss(rows.logprobs, rows.advantages), torch.zeros_like(rows.loss_weights)
    if loss.surrogate == "cispo":
        acted = (log_ratio.exp() > 1.0 + loss.clip_high) | (log_ratio.exp() < 1.0 - loss.clip_low)
        return cispo_loss(rows.logprobs, rows.old_logprobs, rows.advantages, **bounds), acted
    if loss.surrogate == "gspo":
        mean = response_means(log_ratio, rows.response_lengths, rows.cp_group)
        acted = clip_fraction_terms(mean, rows.advantages, **bounds)
        return gspo_loss(rows.logprobs, mean, rows.advantages, **bounds), acted
    acted = clip_fraction_terms(log_ratio, rows.advantages, **bounds)
    return clipped_policy_loss(rows.logprobs, rows.old_logprobs, rows.advantages, **bounds), acted


def _importance_weights(loss: LossConfig, rows: TokenRows) -> torch.Tensor:
    old, rollout, cap = rows.old_logprobs, rows.rollout_logprobs, loss.importance_cap
    if loss.importance_level == "sequence":
        log_ratio = response_sums(old - rollout, rows.response_lengths, rows.cp_group)
        return truncated_sequence_weights(log_ratio, cap=cap)
    return truncated_importance_weights(old, rollout, cap=cap)


def _kept(loss: LossConfig, rows: TokenRows) -> torch.Tensor:
    reduce = response_means if loss.sequence_mask == "geometric" else response_sums
    mismatch = rows.old_logprobs - rows.rollout_logprobs
    log_ratio = reduce(mismatch, rows.response_lengths, rows.cp_group)
    return sequence_mask(log_ratio, low=loss.sequence_mask_low, high=loss.sequence_mask_high)


def policy_objective(loss: LossConfig) -> Objective:
    """The surrogate, its importance correction, the KL and entropy terms, the sequence mask."""

    def objective(rows: TokenRows) -> tuple[torch.Tensor, Sums, Sums]:
        per_token, clipped = _surrogate(loss, rows)
        weights = rows.loss_weights
        sums: Sums = {"clipped": clipped.sum()}
        if loss.importance_cap > 0:
            per_token = per_token * _importance_weights(loss, rows)
        if rows.ref_logprobs is not None:
            kl = kl_estimate(rows.logprobs, rows.ref_logprobs, kind=loss.kl_kind)
            sums["kl_ref"] = kl.detach().sum()
            if loss.kl_coef > 0:
                per_token = per_token + loss.kl_coef * kl
        if loss.entropy_coef > 0:
            per_token = per_token - loss.entropy_coef * rows.entropy
        if loss.sequence_mask != "none":
            kept = _kept(loss, rows)
            weights = weights * kept
            sums["masked"] = (~kept).sum()
        mismatch_sums, maxima = _mismatch(rows)
        return (weights * per_token).sum(), sums | mismatch_sums, maxima

    return objective


@torch.no_grad()
def _mismatch(rows: TokenRows) -> tuple[Sums, Sums]:
    """What is reported of every microbatch: entropy, and engine against policy."""
    mismatch = rows.old_logprobs - rows.rollout_logprobs
    sums = {
        "tokens": torch.tensor(float(len(mismatch)), device=mismatch.device),
        "entropy": rows.entropy.sum(),
        "mismatch_kl": kl_estimate(rows.rollout_logprobs, rows.old_logprobs).sum(),
        "mismatch_abs": mismatch.abs().sum(),
    }
    maxima = {"mismatch_max": mismatch.abs().amax() if len(mismatch) else sums["entropy"]}
    return sums, maxima


def next_token_objective(rows: TokenRows) -> tuple[torch.Tensor, Sums, Sums]:
    """Cross-entropy, summed: what pretraining minimises."""
    tokens = torch.tensor(float(len(rows.logprobs)), device=rows.logprobs.device)
    sums = {"tokens": tokens, "entropy": rows.entropy.detach().sum()}
    return -(rows.loss_weights * rows.logprobs).sum(), sums, {}
