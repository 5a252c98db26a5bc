"""One step's rewards and lengths as metrics, the paper's two biases included."""

from collections.abc import Sequence
from statistics import fmean

from megatron_zero.types import OUTCOMES, Graded, RolloutGroup


def rollout_metrics(
    groups: Sequence[RolloutGroup], graded: Sequence[Sequence[Graded]]
) -> dict[str, float]:
    """Metrics of one rollout, over all responses of the step.

    `reward/mean` is what training sees, but for an overlong penalty (`reward/shaped_mean`);
    `reward/correct_frac` counts truncated responses by their
    verdict, as the reference's logged reward does (reference A3.2). Groups whose rewards are all
    alike give no gradient: `reward/no_signal_frac`. Wrong responses growing longer than correct
    ones is the length bias (paper, section 3): `response/length_correct`, `response/length_wrong`.

    Args:
        groups: P groups.
        graded: [P][G] verdicts.
    """
    responses = [response for group in groups for response in group.responses]
    verdicts = [verdict for row in graded for verdict in row]
    lengths = [len(response.token_ids) for response in responses]
    metrics = {
        "reward/mean": fmean(v.reward for v in verdicts),
        "reward/correct_frac": fmean(v.correct for v in verdicts),
        "reward/formatted_frac": fmean(v.formatted for v in verdicts),
        "reward/no_signal_frac": fmean(len({v.reward for v in row}) == 1 for row in graded),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated_frac": fmean(response.truncated for response in responses),
        "prompt/length_mean": fmean(len(group.prompt.token_ids) for group in groups),
    }
    for outcome in OUTCOMES:
        metrics[f"outcome/{outcome}_frac"] = fmean(v.outcome == outcome for v in verdicts)
    for name, wanted in (("correct", True), ("wrong", False)):
        chosen = [n for n, v in zip(lengths, verdicts, strict=True) if v.correct == wanted]
        if chosen:
            metrics[f"response/length_{name}"] = fmean(chosen)
    return metrics
