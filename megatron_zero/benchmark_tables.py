"""Results of evaluations as tables: one model's, as papers print them, and two compared."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zero.analysis.statistics import mean_intervals, sign_flip_p_value
from megatron_zero.checks import fail
from megatron_zero.determinism import derive_seed

Results = dict[str, dict]  # of `evaluate.summarize`


def table(results: Mapping[str, Results]) -> str:
    """Markdown: a row per metric and template; benchmarks as columns, their average last."""
    (first, *_) = results.values()
    rows = [["metric", "template", *next(iter(first.values()))]]
    for mode, by_name in first.items():
        n = next(iter(by_name.values()))["num_samples"]
        for metric in by_name["average"]["metrics"]:
            title = f"avg@{n}" if (mode, metric) == ("sampled", "accuracy") else f"{mode} {metric}"
            scale = 1 if metric == "length_mean" else 100
            for template, each in results.items():
                numbers = [scale * np.array(e["metrics"][metric]) for e in each[mode].values()]
                cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*number) for number in numbers]
                rows.append([title, template, *cells])
    return _markdown(rows)


def compare(first: Path, second: Path) -> str:
    """Two result files, paired by problem: B - A with its interval and a p-value.

    Of each mode that both have: the accuracy, and of several samples maj@k and pass@k for the
    largest k of both. What was drawn differently is said below the table.

    Raises:
        ValueError: not result files, without a common benchmark, or not on the same problems.
    """
    (a, a_settings), (b, b_settings) = map(_read, (first, second))
    rows = [["metric", "benchmark", "A", "B", "B - A", "p"]]
    for mode in filter(b.__contains__, a):
        names = [name for name in a[mode] if name in b[mode] and name != "average"]
        entries = [each[mode][name] for each in (a, b) for name in names]
        for metric in _common_metrics(entries):
            title = f"{mode} {metric}"
            parts = {}
            for name in names:
                values = [_by_problem(each[mode][name], metric) for each in (a, b)]
                parts[name] = [_paired(*values, name)]
            parts["average"] = [part for (part,) in parts.values()]
            for name, pairs in parts.items():
                rows.append([title, name, *_difference(pairs, name)])
    if len(rows) == 1:
        fail("--compare", f"{first} {second}", "no benchmark in the same mode in both")
    return _markdown(rows) + _differences_in_drawing(a_settings, b_settings)


def _common_metrics(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy, and maj@k and pass@k for the largest k that all have; none of no benchmarks."""
    if not entries:
        return []
    metrics = ["accuracy"]
    for kind in ("maj@", "pass@"):
        ks = set.intersection(*(_ks(entry, kind) for entry in entries))
        if ks:
            metrics.append(f"{kind}{max(ks)}")
    return metrics


def _ks(entry: Mapping[str, Any], kind: str) -> set[int]:
    names = entry.get("at_k", {})  # files of versions without it have accuracies alone
    return {int(name.removeprefix(kind)) for name in names if name.startswith(kind)}


def _by_problem(entry: Mapping[str, Any], metric: str) -> Mapping[str, float]:
    return entry["problems"] if metric == "accuracy" else entry["at_k"][metric]


def _difference(pairs: Sequence[np.ndarray], name: str) -> list[str]:
    """The cells of A, B, B - A and its p-value, from each benchmark's [P, 3]."""
    seed = derive_seed("compare", name)
    (old, *_), (new, *_), difference = 100 * mean_intervals(pairs, seed)
    shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference)
    p_value = sign_flip_p_value([pair[:, 2] for pair in pairs], seed)
    return [f"{old:.1f}", f"{new:.1f}", shown, f"{p_value:.4f}"]


def _differences_in_drawing(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """A line for each setting that decides what is drawn, where A and B have another value."""
    names = ["data.template", "evaluation.max_response_tokens"]
    names += [name for name in a if name.startswith("evaluation.") and name not in names]
    left_out = ("evaluation.datasets", "evaluation.every_num_steps", "evaluation.max_prompts")
    lines = []
    for name in names:
        both = name in a and name in b
        if both and name not in left_out and a[name] != b[name]:
            lines.append(f"different: {name} is {a[name]!r} in A and {b[name]!r} in B\n")
    return "".join(lines)


def _paired(a: Mapping[str, float], b: Mapping[str, float], name: str) -> np.ndarray:
    """[P, 3] accuracy of A, of B, and B - A, of each problem."""
    if a.keys() != b.keys():
        fail("--compare", name, "has not the same problems in both")
    return np.array([[a[i], b[i], b[i] - a[i]] for i in a])


def _read(path: Path) -> tuple[Results, dict[str, Any]]:
    """Results and settings."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["results"], data["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail("--compare", str(path), f"not a file of results: {error!r}")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in ruled)
