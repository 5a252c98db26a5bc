"""Accuracy on held-out prompts, with the training engine and verifier."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_zero.config import RunConfig
from megatron_zero.data.templates import stop_strings
from megatron_zero.determinism import derive_seed
from megatron_zero.grading import Grader
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.types import Graded, Prompt, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """One data set's responses and verdicts."""

    groups: list[RolloutGroup]
    graded: list[list[Graded]]

    @property
    def accuracy(self) -> float:
        """Mean over prompts of the fraction of correct samples, truncated ones by their verdict."""
        return fmean(fmean(v.correct for v in row) for row in self.graded)

    @property
    def mean_length(self) -> float:
        """Response tokens."""
        return fmean(len(r.token_ids) for group in self.groups for r in group.responses)


def evaluate(
    config: RunConfig,
    datasets: Mapping[str, Sequence[Prompt]],
    sampler: Sampler,
    grader: Grader,
    *,
    policy_version: int,
) -> dict[str, EvaluationResult]:
    """Generate for every data set and grade; collective, the same result on every rank.

    Greedy by default (`evaluation.temperature` 0). Sampled responses are seeded by prompt and
    sample alone, so two checkpoints are compared on the same random numbers.
    """
    settings = SamplingSettings(
        max_tokens=config.max_evaluation_tokens,
        temperature=config.evaluation.temperature,
        stop=stop_strings(config.data.template),
    )

    def seed_of(place: int, prompt: Prompt, sample: int) -> int:
        return derive_seed(config.seed, "evaluation", prompt.source, prompt.index, sample)

    results = {}
    for name, prompts in datasets.items():
        groups = sampler.sample(
            prompts,
            settings,
            group_size=config.evaluation.num_samples,
            seed_of=seed_of,
            policy_version=policy_version,
        )
        results[name] = EvaluationResult(groups=groups, graded=grader.score(groups))
    return results


def evaluation_metrics(results: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """`eval/<data set>/accuracy`, `length_mean` and their unweighted averages (reference A7)."""
    metrics = {}
    for name, result in results.items():
        metrics[f"eval/{name}/accuracy"] = result.accuracy
        metrics[f"eval/{name}/length_mean"] = result.mean_length
    if len(results) > 1:
        metrics["eval/average/accuracy"] = fmean(r.accuracy for r in results.values())
        metrics["eval/average/length_mean"] = fmean(r.mean_length for r in results.values())
    return metrics


def evaluation_record(results: Mapping[str, EvaluationResult]) -> str:
    """Every response with its verdict as JSON, for `eval/step_*.json`."""
    record: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        record[name] = [
            {
                "prompt": group.prompt.text,
                "reference": list(group.prompt.answers),
                "output": [response.text for response in group.responses],
                "num_tokens": [len(response.token_ids) for response in group.responses],
                "truncated": [response.truncated for response in group.responses],
                "correct": [verdict.correct for verdict in row],
                "outcome": [verdict.outcome for verdict in row],
            }
            for group, row in zip(result.groups, result.graded, strict=True)
        ]
    return json.dumps(record, ensure_ascii=False, indent=1)
