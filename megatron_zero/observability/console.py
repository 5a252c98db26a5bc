"""The console: how far the run is, and whether it learns.

In a terminal, a panel that is redrawn at each step: the reward's curve, the last values, a
progress bar and the remaining time. Anywhere else (a log file, a job's output) one aligned line per
step, with the header repeated, so that it can be read from the middle.

Redrawn only when something is logged: no thread of its own, which a process that forks workers and
owns an accelerator is better without.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_zero.observability.plot import render_curve

HEADER_EVERY = 20  # lines
_TIMED_STEPS = 20  # the remaining time is estimated from the last ones
_NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """One value of the step's line: the metric, its title, its format."""

    metric: str
    title: str
    form: str

    def text(self, values: Mapping[str, float]) -> str:
        value = values.get(self.metric, math.nan)
        return format(value, self.form) if math.isfinite(value) else _NOTHING


HELD_OUT = "eval/accuracy"  # made here: the mean of every `eval/<dataset>/accuracy` of a step

TRAIN_COLUMNS = (
    Column("reward/mean", "reward", ".3f"),
    Column(HELD_OUT, "held-out", ".3f"),
    Column("response/length_mean", "length", ".0f"),
    Column("response/truncated_frac", "truncated", ".1%"),
    Column("policy/grad_norm", "grad norm", ".3g"),
    Column("mismatch/kl", "mismatch", ".1e"),
    Column("throughput/tokens_per_s", "tokens/s", ",.0f"),
    Column("time/step_s", "s/step", ".1f"),
)

PRETRAIN_COLUMNS = (
    Column("policy/loss", "loss", ".4f"),
    Column("policy/grad_norm", "grad norm", ".3g"),
    Column("policy/lr", "lr", ".2e"),
    Column("throughput/tokens_per_s", "tokens/s", ",.0f"),
    Column("time/step_s", "s/step", ".2f"),
)


def accuracies(values: Mapping[str, float]) -> dict[str, float]:
    """Data set -> accuracy, of every `eval/<data set>/accuracy`."""
    found = ((re.fullmatch("eval/(.*)/accuracy", name), value) for name, value in values.items())
    return {match[1]: value for match, value in found if match}


def held_out_accuracy(values: Mapping[str, float]) -> float | None:
    """Unweighted mean over the data sets evaluated at a step; None: no evaluation."""
    found = accuracies(values).values()
    return fmean(found) if found else None


def format_duration(seconds: float) -> str:
    """`04:05`, `1:02:03`, `2 days, 1:02:03`."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


class ConsoleSink:
    """Progress for a person; see the module's docstring."""

    def __init__(
        self,
        name: str,
        num_steps: int,
        *,
        start_step: int = 0,
        columns: Sequence[Column] = TRAIN_COLUMNS,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            name: of the run.
            num_steps: of the whole run.
            start_step: as `sinks.make_sinks`; the steps before it are done.
            columns: what a step shows; the first one is also drawn as a curve.
            console: None: the standard output.
        """
        self._name, self._num_steps, self._columns = name, num_steps, tuple(columns)
        self._console = console or Console()
        self._clock = clock
        self._marks: deque[float] = deque([clock()], maxlen=_TIMED_STEPS + 1)
        self._num_done = max(start_step - 1, 0)
        self._num_lines = 0
        self._last: dict[str, float] = {}
        self._history: list[tuple[int, float]] = []
        self._evaluations: list[float] = []
        self._live = None
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values after `step` steps; an evaluation alone does not count as a step."""
        accuracy = held_out_accuracy(values)
        shown = dict(values)
        if accuracy is not None:
            shown[HELD_OUT] = accuracy
            self._evaluations.append(accuracy)
        is_step = any(c.metric in values for c in self._columns)
        if is_step:
            self._num_done = step
            self._marks.append(self._clock())
            self._history.append((step, values.get(self._columns[0].metric, math.nan)))
        self._last |= shown
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
            return
        if is_step:
            self._print_line(step, shown)
        if accuracy is not None:
            named = ", ".join(f"{name} {value:.3f}" for name, value in accuracies(values).items())
            text = Text(f"held-out accuracy after {step} steps: {named}")
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def remaining_s(self) -> float | None:
        """Estimate for the steps that are left; None before the first."""
        if len(self._marks) < 2:
            return None
        per_step = (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)
        return per_step * (self._num_steps - self._num_done)

    def _remaining(self) -> str:
        seconds = self.remaining_s()
        return _NOTHING if seconds is None else format_duration(seconds)

    def _print_line(self, step: int, values: Mapping[str, float]) -> None:
        titles = ["step", *(column.title for column in self._columns), "left"]
        cells = [f"{step}/{self._num_steps}", *(column.text(values) for column in self._columns)]
        widths = [len(f"{self._num_steps}/{self._num_steps}")]
        widths += [max(len(title), 8) for title in titles[1:]]
        lines = [titles] if self._num_lines % HEADER_EVERY == 0 else []
        self._num_lines += 1
        for line in [*lines, [*cells, self._remaining()]]:
            self._console.print(Text("  ".join(map(str.rjust, line, widths))), soft_wrap=True)

    def _panel(self) -> Panel:
        width = max(min(self._console.width - 4, 96), 24)
        parts: list[object] = []
        if len(self._history) > 1:
            steps, values = zip(*self._history, strict=True)
            curve = render_curve(values, width, height=6, steps=(steps[0], steps[-1]))
            parts += [Text(self._columns[0].title, style="bold"), Text(curve, style="cyan"), ""]
        parts += [self._values_table(), ""]
        if self._evaluations:
            start, best = self._evaluations[0], max(self._evaluations)
            note = f"held-out accuracy: first {start:.3f}, best {best:.3f}"
            parts += [Text(note, style="dim"), ""]
        parts.append(self._progress())
        return Panel(Group(*parts), title=self._name, title_align="left", width=width + 4)

    def _values_table(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in self._columns:
            table.add_column(justify="right")
        table.add_row(*[Text(c.title, style="dim") for c in self._columns])
        table.add_row(*[Text(c.text(self._last), style="bold") for c in self._columns])
        return table

    def _progress(self) -> Table:
        row = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            row.add_column(no_wrap=ratio is None, ratio=ratio)
        bar = ProgressBar(total=self._num_steps, completed=self._num_done)
        place = f"step {self._num_done}/{self._num_steps}"
        row.add_row(place, bar, f"left {self._remaining()}")
        return row
