import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_zero.observability.plot import render_curve
from megatron_zero.observability.summary import print_summary, summary_table, time_table


def heights(drawing: str) -> list[int | None]:
    """Highest dot of each character column, counted in dots from the bottom; None: empty."""
    rows = [line.partition("┤")[2] for line in drawing.splitlines()[:-1]]
    width = max(map(len, rows))
    found = []
    for column in range(width):
        best = None
        for i, row in enumerate(rows):
            bits = ord(row[column]) - 0x2800 if column < len(row) and row[column] != " " else 0
            for y, mask in enumerate((0x09, 0x12, 0x24, 0xC0)):
                if bits & mask and best is None:
                    best = 4 * (len(rows) - i) - 1 - y
        found.append(best)
    return found


def test_a_line_goes_from_corner_to_corner():
    drawing = render_curve([float(i) for i in range(50)], width=40, height=6, steps=(5, 54))
    lines = drawing.splitlines()
    assert len(lines) == 7
    assert lines[0].split()[0] == "49" and lines[5].split()[0] == "0"
    assert lines[6].split() == ["step", "└", "5", "54"]
    found = heights(drawing)
    assert len(found) == 32 and found[0] in (0, 1) and found[-1] == 23
    assert found == sorted(found) and None not in found


def test_the_peak_is_where_it_is():
    values = [0.0] * 20 + [1.0] + [0.0] * 19
    found = heights(render_curve(values, width=50, height=4))
    assert found.index(max(found)) == pytest.approx(20, abs=1)


def test_more_values_than_dots_keep_their_place():
    found = heights(render_curve([0.0] * 700 + [1.0] * 300, width=48, height=4))
    assert len(found) == 40
    assert found.index(15) == pytest.approx(0.7 * 40, abs=1) and found[-1] == 15


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_gaps_stay_empty(gap):
    found = heights(render_curve([1.0] * 5 + [gap] * 10 + [1.0] * 5, width=30, height=2))
    assert found[0] is not None and found[-1] is not None and found[len(found) // 2] is None


def test_nothing_to_draw():
    for values in ([], [None], [math.nan]):
        assert render_curve(values) == "(nothing to draw yet)"


def test_one_value_and_constants_are_in_the_middle():
    lines = render_curve([0.5], width=30, height=4).splitlines()
    assert [line.split()[0] for line in lines][2] == "0.5"
    assert heights(render_curve([3.0, 3.0], width=30, height=4))[0] == pytest.approx(8, abs=1)


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300)), max_size=400),
    st.integers(20, 100),
    st.integers(2, 12),
)
@settings(deadline=None)
def test_any_values_give_the_size_that_was_asked_for(values, width, height):
    lines = render_curve(values, width, height).splitlines()
    if any(v is not None for v in values):
        assert len(lines) == height + 1
    assert all(len(line) <= max(width, 22) for line in lines)


RECORDS = [
    {
        "step": i,
        "reward/mean": 0.2 + i / 100,
        "response/length_mean": 1800.0 - i,
        "time/step_s": 40.0,
        "time/rollout_s": 22.0,
        "time/train_s": 10.0,
    }
    for i in range(50)
]
RECORDS[0]["eval/math500/accuracy"] = 0.3
RECORDS[20]["eval/math500/accuracy"] = math.nan
RECORDS[30]["eval/math500/accuracy"] = 0.6
RECORDS[-1]["eval/math500/accuracy"] = 0.55


def text(table) -> list[list[str]]:
    output = io.StringIO()
    Console(file=output, width=100).print(table)
    rows = [line.split("│")[1:-1] for line in output.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_start_and_end():
    rows = text(summary_table(RECORDS))
    assert rows[0] == ["accuracy math500", "0.300", "0.550", "+0.250"]
    assert rows[1] == ["reward", "0.220", "0.670", "+0.450"]  # means of five steps each
    assert rows[2] == ["response length", "1,798", "1,753", "-45"]
    assert len(rows) == 3
    assert summary_table(RECORDS).title == "50 steps"


def test_time_by_phase():
    table = time_table(RECORDS)
    assert table.title == "time: 33:20"
    assert text(table) == [
        ["rollout", "18:20", "55.0%"],
        ["train", "08:20", "25.0%"],
        ["other", "06:40", "20.0%"],
    ]


def test_phases_outside_of_the_step_count_too():
    records = [{"step": 0, "time/step_s": 10.0, "time/train_s": 10.0, "time/eval_s": 30.0}]
    assert text(time_table(records)) == [["eval", "00:30", "75.0%"], ["train", "00:10", "25.0%"]]


def test_the_whole_summary():
    output = io.StringIO()
    print_summary(RECORDS, Console(file=output, width=100))
    lines = output.getvalue().splitlines()
    assert lines[0] == "reward" and "┤" in lines[1]
    assert "accuracy math500" in output.getvalue() and "rollout" in output.getvalue()


def test_a_run_without_a_step():
    output = io.StringIO()
    print_summary([], Console(file=output))
    assert "0 steps" in output.getvalue()
