"""The figure of `megatron-zero analyze`: every table as lines over steps, or as bars.

Nothing covers the data: legends stand beside the axes. What would be drawn over something equal is
named with it ("run = dr_grpo"), and what is 0 throughout is said instead of drawn as bars that
cannot be seen. Many steps are smoothed, with the single ones behind.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_zero.analyze_tables import Titled, file_labels, is_by_file, step_of_path

WIDTH, LINES_HEIGHT, BAR_HEIGHT, ROW_HEIGHT = 16.0, 3.4, 0.14, 0.25  # inches
MAX_FILES_AS_BARS = 12  # more are a row of dots each
MAX_THICKNESS = 0.4  # of a bar, where 1 is the distance of two names
MAX_UPRIGHT_BARS = 30  # more, or long names, lie on their sides
MANY_STEPS = 60  # from which on they are smoothed
_MARKERS = "osD^vP*X<>"


def draw(tables: Sequence[Titled], path: Path) -> None:
    """Write `figure_of` the tables."""
    figure_of(tables).savefig(path)


def figure_of(tables: Sequence[Titled]) -> Figure:
    """All tables as one figure, two beside each other."""
    panels = [panel for table in tables for panel in _panels(table)]
    rows = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [max(_height(panel.data) for panel in row) for row in rows]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            _draw_panel(figure.add_subplot(grid[number, column]), panel)
    return figure


def _panels(table: Titled) -> list[Titled]:
    """A table by file becomes one over the steps of each run; other files are named."""
    if not is_by_file(table.data):
        return [table]
    data = _without_totals(table)
    groups: dict[tuple[str, str], list[int]] = {}
    named = []
    for place, (file, sampling) in enumerate(data.index):
        if step_of_path(Path(file)) is None:
            named.append(place)
        else:
            groups.setdefault((str(Path(file).parent), sampling), []).append(place)
    series = {}
    for key, places in groups.items():
        if len(places) > 1:
            series[key] = places
        else:
            named += places
    panels = []
    for (folder, sampling), places in series.items():
        steps = [step_of_path(Path(file)) for file, _ in data.index[places]]
        over_steps = data.iloc[places].set_axis(pd.Index(steps, name="step"), axis=0)
        title = table.title
        if len(series) > 1 or named:
            title = f"{title}: {_series_name(Path(folder), sampling)}"
        panels.append(replace(table, title=title, data=over_steps, unit=_unit(table)))
    if named:
        of_files = data.iloc[sorted(named)]
        of_files = of_files.set_axis(file_labels(of_files), axis=0)
        panels.append(replace(table, data=of_files, unit=_unit(table)))
    return panels


def _series_name(folder: Path, sampling: str) -> str:
    """A run by its name, with `eval` and the sampling if it is its evaluations: `a/eval greedy`."""
    run = folder.parent.name
    if folder.name == "rollouts":
        return run
    return f"{run}/{folder.name} {sampling}".strip()


def _without_totals(table: Titled) -> pd.DataFrame:
    """Counts as shares of all, so that files of unlike sizes compare; the rest as it is."""
    data = table.data
    if table.title == "accuracy" or "all" not in data:
        return data
    return data.drop(columns="all").div(data["all"], axis=0)


def _unit(table: Titled) -> str:
    return table.unit.replace("number of", "share of")


def _height(data: pd.DataFrame) -> float:
    if _is_over_numbers(data) or not _lies(data):
        return LINES_HEIGHT
    if len(data) > MAX_FILES_AS_BARS:
        return max(LINES_HEIGHT, 1.2 + ROW_HEIGHT * len(data))
    num_bars = len(data) * (len(_distinct_columns(data)[0]) + 1)
    return max(LINES_HEIGHT, 1.2 + BAR_HEIGHT * num_bars)


def _is_over_numbers(data: pd.DataFrame) -> bool:
    return pd.api.types.is_numeric_dtype(data.index)


def _lies(data: pd.DataFrame) -> bool:
    longest = max(len(str(name)) for name in data.index)
    return data.size > MAX_UPRIGHT_BARS or longest * len(data) > 60


def _distinct_columns(data: pd.DataFrame) -> tuple[dict[str, pd.Series], list[str]]:
    """Columns by label, equal ones together; and the names of those with nothing to see."""
    labels: list[list[str]] = []
    values: list[pd.Series] = []
    absent = []
    for name in data.columns:
        column = data[name]
        if not column.fillna(0).any():
            what = "none" if column.isna().all() else "0 throughout"
            absent.append(f"{name}: {what}")
            continue
        same = [i for i, other in enumerate(values) if _are_equal(column, other)]
        if same:
            labels[same[0]].append(str(name))
        else:
            labels.append([str(name)])
            values.append(column)
    named = {_joined(names): column for names, column in zip(labels, values, strict=True)}
    return named, absent


def _joined(names: Sequence[str]) -> str:
    """One label of several names: beneath each other, because a legend is narrow."""
    return "\n= ".join(names)


def _are_equal(first: pd.Series, second: pd.Series) -> bool:
    # a run's own advantages were float32; nobody sees a difference of 1e-5 in a figure
    return bool(np.allclose(first, second, rtol=1e-5, atol=1e-12, equal_nan=True))


def _draw_panel(axes: Axes, panel: Titled) -> None:
    data = panel.data.rename(columns=lambda name: str(name).removeprefix(panel.prefix))
    columns, absent = _distinct_columns(data)
    axes.set_title(panel.title)
    if not columns:  # all 0: the line or the bars at 0 are what there is to see
        names = [str(name) for name in data.columns]
        columns, absent = {_joined(names): data[data.columns[0]].fillna(0)}, []
    if _is_over_numbers(data):
        of_what = str(data.index.name).replace("_", " ")
        window = _draw_lines(axes, columns)
        axes.set_xlabel(of_what if window == 1 else f"{of_what} (lines: means of {window})")
        axes.set_ylabel(panel.unit)
        if pd.api.types.is_integer_dtype(data.index):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif _lies(data):
        if len(data) > MAX_FILES_AS_BARS:
            _draw_dots(axes, columns)
        else:
            _draw_bars(axes, columns, lies=True)
        axes.set_yticks(range(len(data)), [str(name) for name in data.index], fontsize=8)
        axes.invert_yaxis()  # the first on top, as in the table
        axes.set_xlabel(panel.unit)
    else:
        _draw_bars(axes, columns, lies=False)
        axes.set_xticks(range(len(data)), [str(name) for name in data.index])
        axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if panel.data.shape[1] > 1:
        _add_legend(axes, absent)


def _add_legend(axes: Axes, absent: Sequence[str]) -> None:
    """Beside the axes, with the names of what is not drawn beneath."""
    handles, labels = axes.get_legend_handles_labels()
    for label in absent:
        handles.append(Line2D([], [], linestyle="none"))
        labels.append(label)
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9
    )


def _draw_lines(axes: Axes, columns: dict[str, pd.Series]) -> int:
    """The lines; how many steps each of their points is the mean of."""
    window = 1
    for number, (label, column) in enumerate(columns.items()):
        color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
        if len(column) <= MANY_STEPS:
            axes.plot(column.index, column, color=color, marker=marker, markersize=4, label=label)
            continue
        window = len(column) // 20
        smooth = column.rolling(window, center=True, min_periods=1).mean().where(column.notna())
        axes.plot(column.index, column, ".", color=color, alpha=0.4, markersize=4)
        axes.plot(column.index, smooth, color=color, label=label)
    return window


def _draw_bars(axes: Axes, columns: dict[str, pd.Series], *, lies: bool) -> None:
    """Groups of bars, each with its number: one that is 0 is seen to be 0."""
    thickness = min(0.85 / len(columns), MAX_THICKNESS)
    places = np.arange(len(next(iter(columns.values()))))
    for number, (label, column) in enumerate(columns.items()):
        at = places + (number - (len(columns) - 1) / 2) * thickness
        color = f"C{number % 10}"
        if lies:
            bars = axes.barh(at, column, thickness, label=label, color=color)
        else:
            bars = axes.bar(at, column, thickness, label=label, color=color)
        numbers = ["" if np.isnan(value) else f"{value:.3g}" for value in column]
        axes.bar_label(bars, numbers, fontsize=6, padding=1)
    if lies:
        axes.margins(x=0.1, y=0.01)
    else:
        axes.margins(y=0.08)


def _draw_dots(axes: Axes, columns: dict[str, pd.Series]) -> None:
    """A row for each name, a dot in it for each column."""
    for number, (label, column) in enumerate(columns.items()):
        color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
        axes.plot(column, range(len(column)), marker, color=color, alpha=0.8, label=label)
    axes.margins(x=0.05, y=0.02)
