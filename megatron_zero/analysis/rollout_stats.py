"""One step's rewards and lengths as metrics, the paper's two biases included."""

from collections.abc import Mapping, Sequence
from itertools import compress
from statistics import fmean

from megatron_zero.types import OUTCOMES, Graded, RolloutGroup

# By the share of a question's responses that earned a reward, p. Of the first and the last all
# rewards are alike: without an overlong penalty they have no weight.
DIFFICULTIES = ("all_wrong", "hard", "medium", "easy", "all_correct")
LENGTHS = ("q1", "q2", "q3", "q4")  # quarters of the longest response that is allowed


def difficulty(success_rate: float) -> str:
    """The bucket of a question, of `DIFFICULTIES`.

    Example: 0 -> all_wrong, up to 1/4 -> hard, below 3/4 -> medium, below 1 -> easy.
    """
    p = success_rate
    return DIFFICULTIES[(p > 0) + (p > 0.25) + (p >= 0.75) + (p == 1)]


def length_bucket(length: int, max_response_tokens: int) -> str:
    """The bucket of a response, of `LENGTHS`.

    Example: of at most 100 tokens, 1 to 25 are q1, 26 to 50 q2.
    """
    return LENGTHS[max(-(-4 * length // max_response_tokens) - 1, 0)]


def rollout_metrics(
    groups: Sequence[RolloutGroup], graded: Sequence[Sequence[Graded]], has_signal: Sequence[bool]
) -> dict[str, float]:
    """Metrics of one rollout, over all responses of the step.

    `reward/mean` is what training sees, but for an overlong penalty (`reward/shaped_mean`);
    `reward/correct_frac` counts truncated responses by their
    verdict, as the reference's logged reward does (reference A3.2). Groups whose responses
    all have advantage 0 give no gradient: `reward/no_signal_frac`. Wrong responses growing longer
    than correct ones is the length bias (paper, section 3): `response/length_correct`,
    `response/length_wrong`.

    Args:
        groups: P groups.
        graded: [P][G] verdicts.
        has_signal: [P] of `advantages.groups_with_signal`.
    """
    responses = [response for group in groups for response in group.responses]
    verdicts = [verdict for row in graded for verdict in row]
    lengths = [len(response.token_ids) for response in responses]
    metrics = {
        "reward/mean": fmean(v.reward for v in verdicts),
        "reward/correct_frac": fmean(v.correct for v in verdicts),
        "reward/formatted_frac": fmean(v.formatted for v in verdicts),
        "reward/no_signal_frac": fmean(not signal for signal in has_signal),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated_frac": fmean(response.truncated for response in responses),
        "prompt/length_mean": fmean(len(group.prompt.token_ids) for group in groups),
    }
    for outcome in OUTCOMES:
        metrics[f"outcome/{outcome}_frac"] = fmean(v.outcome == outcome for v in verdicts)
    kinds = {"correct": [v.correct for v in verdicts], "wrong": [not v.correct for v in verdicts]}
    kinds["truncated"] = [response.truncated for response in responses]
    for kind, members in kinds.items():
        if any(members):
            metrics[f"response/length_{kind}"] = fmean(compress(lengths, members))
    return metrics


def weight_metrics(
    groups: Sequence[RolloutGroup],
    graded: Sequence[Sequence[Graded]],
    weights: Mapping[int, float],
    *,
    max_response_tokens: int,
) -> dict[str, float]:
    """Where the gradient of a step comes from: the share of its weight in each bucket.

    `weight/difficulty_*` sum to 1 and so do `weight/length_*`; neither is there in a step that has
    no signal at all.

    Args:
        weights: index of a sample in the step, group by group -> sum of |advantage * weight| over
            its tokens (`batching.sample_weights`, of all ranks); those not in it weigh nothing.
    """
    total = sum(weights.values())
    if not total:
        return {}
    metrics = {f"weight/difficulty_{name}": 0.0 for name in DIFFICULTIES}
    metrics |= {f"weight/length_{name}": 0.0 for name in LENGTHS}
    for p, (group, row) in enumerate(zip(groups, graded, strict=True)):
        of_question = difficulty(fmean(v.reward > 0 for v in row))
        for g, response in enumerate(group.responses):
            share = weights.get(p * len(row) + g, 0.0) / total
            metrics[f"weight/difficulty_{of_question}"] += share
            bucket = length_bucket(len(response.token_ids), max_response_tokens)
            metrics[f"weight/length_{bucket}"] += share
    return metrics
