"""Accuracy on held-out prompts: during training, and by `megatron-zero eval`; one path for both.

`evaluate` draws and grades and gives one record per response, which is what is written to disk;
`summarize` turns records into numbers, whoever drew them; `benchmark_tables` prints those.

    {"benchmark": "aime", "index": 0, "temperature": 1.0, "sample": 3, "prompt": "…",
     "reference": ["204"], "output": "… \\boxed{204}", "num_tokens": 812, "truncated": false,
     "reward": 1.0, "correct": true, "formatted": true, "outcome": "correct", "answer_class": 0}

What counts here is `correct`, the verdict on a response whether it was truncated or not. Responses
of one problem that give the same answer have the same `answer_class`, without an answer null.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from megatron_zero.analysis.statistics import majority_at_k, mean_intervals, pass_at_k
from megatron_zero.config import EvaluationConfig, RunConfig, fail
from megatron_zero.config_data import dataset_name
from megatron_zero.data.datasets import Row, evaluation_data, load_rows
from megatron_zero.data.prompts import build_prompts
from megatron_zero.data.templates import stop_strings
from megatron_zero.determinism import derive_seed
from megatron_zero.grading import Grader, check_golds
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.types import Prompt

Record = dict[str, Any]
Results = dict[str, dict[str, dict[str, Any]]]  # mode -> benchmark -> numbers


def evaluation_prompts(config: RunConfig, num_positions: int, tokenizer: Any) -> list[Prompt]:
    """The prompts of every data set of `evaluation.datasets`, none left out.

    `data.max_prompt_tokens` is for training: a benchmark is not shortened by it. The response to a
    long prompt may have less room than `max_evaluation_tokens`.

    Args:
        num_positions: how many the model has, see `hf_config.num_positions`.

    Raises:
        ValueError: no such data set, one that is there twice under two names, a prompt that the
            model has no positions for, or gold answers of which the verifier can read none.
    """
    prompts: list[Prompt] = []
    datasets: dict[tuple[Row, ...], str] = {}
    for dataset in config.evaluation.datasets:
        data = evaluation_data(config.data, dataset, config.evaluation.max_prompts)
        rows = load_rows(data, seed=config.seed, setting="evaluation.datasets")
        before = datasets.setdefault(tuple(rows), dataset)
        if before != dataset:
            valid = f"has the same problems as {before}, which would count twice: leave one out"
            fail("evaluation.datasets", dataset, valid)
        room, few_shot, name = num_positions - 1, data.few_shot, dataset_name(dataset)
        fit = build_prompts(rows, tokenizer, data.template, room, name, few_shot=few_shot)
        if missing := len(rows) - len(fit):
            valid = f"{missing} prompts do not fit into the model's {num_positions} positions"
            fail("evaluation.datasets", dataset, valid)
        check_golds(fit, setting="evaluation.datasets", value=dataset)
        prompts += fit
    return prompts


def max_model_len(config: RunConfig, prompts: Sequence[Prompt], num_positions: int) -> int:
    """Tokens of the longest prompt and its response, as far as the model has positions."""
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    return min(longest + config.max_evaluation_tokens, num_positions)


def evaluate(
    config: RunConfig, prompts: Sequence[Prompt], sampler: Sampler, grader: Grader, version: int
) -> list[Record]:
    """`evaluation.num_samples` records per prompt, in order, at `evaluation.temperature`.

    Collective, the same result on every rank. Seeds depend on prompt and sample alone, so two
    checkpoints or templates are compared on the same random numbers, and part of the prompts gives
    what all would. The responses must come from the weights of `version`.
    """
    settings = SamplingSettings(
        max_tokens=config.max_evaluation_tokens,
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        top_k=config.evaluation.top_k,
        stop=stop_strings(config.data.template),
    )

    def seed_of(place: int, prompt: Prompt, sample: int) -> int:
        return derive_seed(config.seed, "evaluation", prompt.source, prompt.index, sample)

    n = config.evaluation.num_samples
    groups = sampler.sample(
        prompts, settings, group_size=n, seed_of=seed_of, policy_version=version
    )
    verdicts, classes = grader.score(groups), grader.answer_classes(groups)
    records: list[Record] = []
    for p, group in enumerate(groups):
        for sample, response in enumerate(group.responses):
            record = {
                "benchmark": group.prompt.source,
                "index": group.prompt.index,
                "temperature": settings.temperature,
                "sample": sample,
                "prompt": group.prompt.text,
                "reference": list(group.prompt.answers),
                "output": response.text,
                "num_tokens": len(response.token_ids),
                "truncated": response.truncated,
            }
            record |= dataclasses.asdict(verdicts[p][sample])
            records.append(record | {"answer_class": classes[p][sample]})
    return records


def sampling_settings(evaluation: EvaluationConfig) -> dict[str, Any]:
    """How an evaluation draws its responses, by dotted name: for what is written and compared."""
    names = ("num_samples", "temperature", "top_p", "top_k")
    return {f"evaluation.{name}": getattr(evaluation, name) for name in names}


def to_jsonl(records: Iterable[Record]) -> bytes:
    """One line per record."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode(errors="surrogatepass")


def summarize(records: Iterable[Record]) -> Results:
    """Each metric with its 95 % interval, by mode ("greedy" or "sampled") and benchmark.

    A metric is a mean over problems of a number per problem; "average" is the unweighted mean over
    benchmarks (reference A7). Intervals: `analysis.statistics.mean_intervals`.

    Returns:
        {"greedy": {"aime": {"metrics": {"accuracy": [0.433, 0.267, 0.6], …}, "num_samples": 1,
        "problems": {"0": 1.0, …}, "at_k": {}}, …, "average": {"metrics": …}}}; of problems the
        accuracies, and their values of what k samples give: {"maj@8": {"0": 1.0, …}, …}.
    """
    problems: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        mode = "sampled" if record["temperature"] else "greedy"
        problems.setdefault((mode, record["benchmark"], record["index"]), []).append(record)
    results: Results = {}
    for (mode, name, index), rows in problems.items():
        empty = {"problems": {}, "at_k": {}, "metrics": []}
        entry = results.setdefault(mode, {}).setdefault(name, empty)
        metrics = _problem_metrics(rows)
        entry["metrics"].append(metrics)
        entry["problems"][str(index)] = metrics["accuracy"]
        for metric, value in metrics.items():
            if "@" in metric:
                entry["at_k"].setdefault(metric, {})[str(index)] = value
        entry["num_samples"] = len(rows)
    for by_name in results.values():
        parts = {}
        for name, entry in by_name.items():
            metrics = list(entry["metrics"][0])  # all rates, but for the last
            parts[name] = [np.array([list(row.values()) for row in entry["metrics"]])]
        by_name["average"], parts["average"] = {}, [part for (part,) in parts.values()]
        for name, entry in by_name.items():
            seed, rates = derive_seed("bootstrap", name), range(len(metrics) - 1)
            numbers = mean_intervals(parts[name], seed, rates).tolist()
            entry["metrics"] = dict(zip(metrics, numbers, strict=True))
    return results


def _problem_metrics(rows: Sequence[Record]) -> dict[str, float]:
    """One problem's numbers, from all of its samples; rates, and last the length in tokens."""
    n, num_correct = len(rows), sum(row["correct"] for row in rows)
    ks = sorted({n, *(2**i for i in range(n.bit_length()))} - {1})
    classes: dict[int, list[bool]] = {}
    for row in rows:
        if row["answer_class"] is not None:
            classes.setdefault(row["answer_class"], []).append(row["correct"])
    votes = [(len(correct), sum(correct)) for correct in classes.values()]
    num_silent = n - sum(size for size, _ in votes)
    return {
        "accuracy": num_correct / n,
        **{f"maj@{k}": majority_at_k(votes, num_silent, k) for k in ks},
        **{f"pass@{k}": pass_at_k(n, num_correct, k) for k in ks},
        "truncated_frac": fmean(row["truncated"] for row in rows),
        "formatted_frac": fmean(row["formatted"] for row in rows),
        "length_mean": fmean(row["num_tokens"] for row in rows),
    }


def evaluation_metrics(results: Results) -> dict[str, float]:
    """`eval/<data set>/<metric>` of an evaluation in one mode, for logs; an average of several."""
    (by_name,) = results.values()
    return {
        f"eval/{name}/{metric}": value
        for name, entry in by_name.items()
        if name != "average" or len(by_name) > 2
        for metric, (value, _, _) in entry["metrics"].items()
    }


def results_json(results: Results, settings: Mapping[str, Any]) -> bytes:
    """What `eval/step_*.json` and `<template>.json` hold, for `megatron-zero eval --compare`."""
    return (json.dumps({"settings": settings, "results": results}, indent=1) + "\n").encode()
