"""The figure of `megatron-zero analyze`: what a reader must be able to see of it."""

import itertools
import math

import pytest

pytest.importorskip("matplotlib")

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_zero.analyze_figure import MANY_STEPS, figure_of
from megatron_zero.analyze_tables import LOGGED, Titled, file_labels

MARKS = ["all", "check again", "verify again", "exclaim", "any keyword"]


def by_file(files: "list[str]", samplings: "tuple[str, ...]" = ("sampled",)) -> Titled:
    """Counts of 100 responses; nothing is verified again, any keyword is an exclamation."""
    pairs = list(itertools.product(files, samplings))
    rows = [[100, 20 + i % 7, 0, 30 + i % 5, 30 + i % 5] for i in range(len(pairs))]
    index = pd.MultiIndex.from_tuples(pairs, names=["file", "sampling"])
    data = pd.DataFrame(rows, columns=MARKS, index=index)
    return Titled(title="responses", data=data, unit="number of responses")


def rollouts(run: str, num_files: int) -> "list[str]":
    return [f"runs/{run}/rollouts/step_{10 * i + 1:06d}.jsonl.zst" for i in range(num_files)]


def drawn(*tables: Titled) -> "tuple[Figure, list[Axes]]":
    figure = figure_of(tables)
    FigureCanvasAgg(figure).draw()
    return figure, figure.axes


def legend_names(axes: Axes) -> "list[str]":
    return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_nothing_covers_anything(figure: Figure) -> None:
    """No legend over any axes, no tick label over another or outside the figure."""
    canvas = figure.canvas.get_renderer()
    inside = [axes.get_window_extent(canvas) for axes in figure.axes]
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            box = legend.get_window_extent(canvas)
            assert not any(box.overlaps(other) for other in inside)
            assert box.x1 <= figure.bbox.x1 + 1
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            visible = [label for at, label in ticks if min(limits) <= at <= max(limits)]
            boxes = [label.get_window_extent(canvas) for label in visible]
            for first, second in itertools.combinations(boxes, 2):
                assert not first.overlaps(second)
            assert all(figure.bbox.x0 - 1 <= box.x0 for box in boxes)


@pytest.mark.parametrize("num_files", [2, 24])
def test_rollouts_of_a_run_are_lines_over_its_steps(num_files) -> None:
    figure, (axes,) = drawn(by_file(rollouts("a", num_files)))
    assert_nothing_covers_anything(figure)
    assert axes.get_title() == "responses" and axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "share of responses"
    names = ["check again", "exclaim\n= any keyword", "verify again: 0 throughout"]
    assert legend_names(axes) == names
    first, second = axes.get_lines()
    assert first.get_xdata().tolist() == [10 * i + 1 for i in range(num_files)]
    assert second.get_ydata().tolist() == [(30 + i % 5) / 100 for i in range(num_files)]


def test_runs_have_axes_of_their_own_and_so_have_greedy_and_sampled() -> None:
    evaluations = [f"runs/b/eval/step_{step:06d}.jsonl" for step in (10, 20)]
    sampled, both = by_file(rollouts("a", 5)), by_file(evaluations, ("greedy", "sampled"))
    table = Titled(title="responses", data=pd.concat([sampled.data, both.data]), unit="share")
    figure, axes = drawn(table)
    assert_nothing_covers_anything(figure)
    titles = ["responses: a", "responses: b/eval greedy", "responses: b/eval sampled"]
    assert [each.get_title() for each in axes] == titles


@pytest.mark.parametrize(
    ("num_files", "name"),
    [(1, "base"), (1, "a_name_that_needs_a_lot_of_room"), (6, "base"), (24, "base")],
)
def test_other_files_are_named_and_every_value_is_seen(num_files, name) -> None:
    files = [f"results/{name}_{i}.jsonl" for i in range(num_files)]
    table = by_file(files, ("greedy", "sampled"))
    figure, (axes,) = drawn(table)
    assert_nothing_covers_anything(figure)
    upright = num_files == 1 and name == "base"
    names = axes.get_xticklabels() if upright else axes.get_yticklabels()
    assert [text.get_text() for text in names] == file_labels(table.data)
    if num_files == 24:  # two columns, a dot each in every row
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [48, 48]
    else:
        numbers = [text.get_text() for text in axes.texts]
        assert numbers[:2] == ["0.2", "0.21"] and len(numbers) == 2 * 2 * num_files


def test_a_bar_of_height_0_is_said_to_be_0_and_a_missing_one_is_not() -> None:
    data = pd.DataFrame({"a": [0.0, 2.0], "b": [1.5, math.nan]}, index=["q1", "q2"])
    _, (axes,) = drawn(Titled(title="t", data=data, unit="u"))
    assert [text.get_text() for text in axes.texts] == ["0", "2", "1.5", ""]
    data = pd.DataFrame({"a": [1, 2], "b": [math.nan, math.nan], "c": [0, 0]}, index=[1, 2])
    _, (axes,) = drawn(Titled(title="t", data=data, unit="u"))
    assert legend_names(axes) == ["a", "b: none", "c: 0 throughout"]
    assert all(tick == int(tick) for tick in axes.get_xticks())
    nothing = pd.DataFrame({"a": [0.0, 0.0], "b": [0.0, 0.0]}, index=["q1", "q2"])
    _, (axes,) = drawn(Titled(title="t", data=nothing, unit="u"))
    assert [text.get_text() for text in axes.texts] == ["0", "0"]
    assert legend_names(axes) == ["a\n= b"]


def test_what_was_logged_has_titles_for_people() -> None:
    steps = pd.RangeIndex(1, 3 * MANY_STEPS + 1, name="step")
    tables = []
    for prefix, (title, unit) in LOGGED.items():
        columns = {f"{prefix}one": steps % 5 / 5, f"{prefix}two": steps % 3 / 3}
        tables.append(
            Titled(title=title, data=pd.DataFrame(columns, index=steps), unit=unit, prefix=prefix)
        )
    figure, axes = drawn(*tables)
    assert_nothing_covers_anything(figure)
    for each in axes:
        assert "/" not in each.get_title() and "_" not in each.get_title()
        assert legend_names(each) == ["one", "two"]
        assert each.get_xlabel() == f"step (lines: means of {3 * MANY_STEPS // 20})"


def test_files_are_named_by_what_tells_them_apart() -> None:
    files = ["a/x/base.jsonl", "b/x/base.jsonl", "runs/c/rollouts/step_000010.jsonl.zst"]
    labels = file_labels(by_file(files).data)
    assert labels == ["a/x/base", "b/x/base", "c/rollouts/step 10"]
    assert file_labels(by_file(["d/e.jsonl"], ("greedy", "sampled")).data) == [
        "e greedy",
        "e sampled",
    ]
