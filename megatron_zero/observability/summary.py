"""The end of a run in two small tables: what changed, and where the time went.

Everything is read back from `metrics.jsonl`, so a resumed run is summed up as a whole, and an old
run can be summed up again.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megatron_zero.observability.console import accuracies, format_duration
from megatron_zero.observability.plot import render_curve

Records = Sequence[Mapping[str, float]]

_STEP_METRICS = (  # metric, row title, how it is shown
    ("reward/mean", "reward", ".3f"),
    ("response/length_mean", "response length", ",.0f"),
    ("response/truncated_frac", "truncated", ".1%"),
    ("policy/loss", "loss", ".4f"),
    ("mismatch/kl", "mismatch KL", ".1e"),
    ("throughput/tokens_per_s", "tokens/s", ",.0f"),
)


def print_summary(records: Records, console: Console | None = None) -> None:
    """The reward's curve (the loss's without rewards) and the tables, on the standard output."""
    console = console or Console()
    for metric, title in (("reward/mean", "reward"), ("policy/loss", "loss")):
        curve = [r for r in records if metric in r]
        if len(curve) > 1:
            steps = (int(curve[0]["step"]), int(curve[-1]["step"]))
            drawn = render_curve([r[metric] for r in curve], steps=steps)
            console.print(Text(title, style="bold"), Text(drawn), sep="\n", soft_wrap=True)
            break
    console.print(Group(summary_table(records), time_table(records)))


def summary_table(records: Records) -> Table:
    """Start and end of the run, from `sinks.read_metrics`.

    Accuracies are the first and the last evaluation's. What is measured every step is averaged over
    the first and the last tenth of the steps, because single steps are noisy.
    """
    num_steps = sum("time/step_s" in r for r in records)
    table = Table(title=f"{num_steps:,} steps", title_justify="left")
    for title in ("", "start", "end", "change"):
        table.add_column(title, justify="left" if not title else "right")
    names = {name for r in records for name in r}
    for name in sorted(accuracies(dict.fromkeys(names, math.nan))):
        if values := _column(records, f"eval/{name}/accuracy"):
            row = _row(f"accuracy {name}", values[0], values[-1], ".3f")
            table.add_row(*row, style="bold")
    for metric, title, form in _STEP_METRICS:
        if values := _column(records, metric):
            tenth = max(len(values) // 10, 1)
            table.add_row(*_row(title, fmean(values[:tenth]), fmean(values[-tenth:]), form))
    return table


def time_table(records: Records) -> Table:
    """Total time of each phase and its share of the whole, the longest first."""
    names = {n for r in records for n in r if n.startswith("time/") and n.endswith("_s")}
    phases = {n: math.fsum(_column(records, n)) for n in names}
    total = phases.pop("time/step_s", 0.0)
    whole = max(total, math.fsum(phases.values()))
    table = Table(title=f"time: {format_duration(whole)}", title_justify="left")
    for title in ("phase", "time", "share"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    rest = whole - math.fsum(phases.values())
    rows = sorted(phases.items(), key=lambda item: -item[1])
    if rest > 0.005 * whole:
        rows.append(("time/other_s", rest))
    for name, seconds in rows:
        phase = name.removeprefix("time/").removesuffix("_s")
        share = f"{seconds / whole:.1%}" if whole else "–"
        table.add_row(phase, format_duration(seconds), share)
    return table


def _column(records: Records, metric: str) -> list[float]:
    return [r[metric] for r in records if metric in r and math.isfinite(r[metric])]


def _row(title: str, start: float, end: float, form: str) -> tuple[str, ...]:
    return title, format(start, form), format(end, form), format(end - start, f"+{form}")
