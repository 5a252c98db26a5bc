"""Results of evaluations as tables: one model's, as papers print them, and two compared."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """Accuracies of two result files, paired by problem: B - A with its interval and a p-value.

    Raises:
        ValueError: not result files, without a common benchmark, or not on the same problems.
    """
    a, b = map(_read, (first, second))
    rows = [["mode", "benchmark", "A", "B", "B - A", "p"]]
    for mode in filter(b.__contains__, a):
        parts = {
            name: [_paired(entry["problems"], b[mode][name]["problems"], name)]
            for name, entry in a[mode].items()
            if name in b[mode] and name != "average"
        }
        parts |= {"average": [part for (part,) in parts.values()]} if parts else {}
        for name, pairs in parts.items():
            seed = derive_seed("compare", name)
            (old, *_), (new, *_), difference = 100 * mean_intervals(pairs, seed)
            shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference)
            p_value = sign_flip_p_value([pair[:, 2] for pair in pairs], seed)
            rows.append([mode, name, f"{old:.1f}", f"{new:.1f}", shown, f"{p_value:.4f}"])
    if len(rows) == 1:
        fail("--compare", f"{first} {second}", "no benchmark in the same mode in both")
    return _markdown(rows)


def _paired(a: Mapping[str, float], b: Mapping[str, float], name: str) -> np.ndarray:
    """[P, 3] accuracy of A, of B, and B - A, of each problem."""
    if a.keys() != b.keys():
        fail("--compare", name, "has not the same problems in both")
    return np.array([[a[i], b[i], b[i] - a[i]] for i in a])


def _read(path: Path) -> Results:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail("--compare", str(path), f"not a file of results: {error!r}")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in ruled)
