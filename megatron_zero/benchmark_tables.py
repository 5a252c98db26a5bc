"""Results of evaluations as tables: one model's, as papers print them, and two compared."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zero.analysis.statistics import mean_intervals, sign_flip_p_value
from megatron_zero.checks import fail
from megatron_zero.determinism import derive_seed
from megatron_zero.evaluate import Results


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
                cells = [f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in numbers]
                rows.append([title, template, *cells])
    return _markdown(rows)


def compare(*paths: Path) -> str:
    """Accuracies of two result files, paired by problem: B - A with its interval and a p-value.

    Raises:
        ValueError: not result files, without a common benchmark, or not on the same problems.
    """
    a, b = map(_read, paths)
    rows = [["mode", "benchmark", "A", "B", "B - A", "p"]]
    for mode, by_name in a.items():
        parts = {}
        for name, entry in by_name.items():
            if name == "average" or mode not in b or name not in b[mode]:
                continue
            if entry["num_correct"].keys() != b[mode][name]["num_correct"].keys():
                fail("--compare", str(paths[1]), f"{name} has not the same problems in both")
            parts[name] = [np.stack([_accuracies(e) for e in (entry, b[mode][name])], axis=1)]
        averaged = {"average": [part for (part,) in parts.values()]} if parts else {}
        for name, pairs in (parts | averaged).items():
            seed, differences = derive_seed("compare", name), [pair @ [-1, 1] for pair in pairs]
            columns = [np.column_stack([p, d]) for p, d in zip(pairs, differences, strict=True)]
            (first, *_), (second, *_), difference = 100 * mean_intervals(columns, seed)
            shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference)
            p_value = f"{sign_flip_p_value(differences, seed):.4f}"
            rows.append([mode, name, f"{first:.1f}", f"{second:.1f}", shown, p_value])
    if len(rows) == 1:
        fail("--compare", " ".join(map(str, paths)), "no benchmark in the same mode in both")
    return _markdown(rows)


def _accuracies(entry: Mapping[str, Any]) -> np.ndarray:
    """[P], in the order of the problems."""
    counts = entry["num_correct"]
    return np.array([counts[i] for i in sorted(counts)]) / entry["num_samples"]


def _read(path: Path) -> Results:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail("--compare", str(path), f"not a file of results: {error!r}")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in ruled)
