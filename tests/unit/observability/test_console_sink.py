import io

import pytest
from rich.console import Console

from megatron_zero.observability.console import (
    HEADER_EVERY,
    PRETRAIN_COLUMNS,
    ConsoleSink,
    format_duration,
    held_out_accuracy,
)

STEP = {
    "reward/mean": 0.41234,
    "response/length_mean": 812.4,
    "response/truncated_frac": 0.031,
    "policy/grad_norm": 0.25,
    "mismatch/kl": 1.2e-5,
    "throughput/tokens_per_s": 12345.6,
    "time/step_s": 41.23,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sink_and_output(*, terminal=False, width=80, **options):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    clock = Clock()
    options = {"num_steps": 100, **options}
    return ConsoleSink("run", console=console, clock=clock, **options), output, clock


def test_one_aligned_line_per_step_also_in_a_narrow_log():
    sink, output, clock = sink_and_output(width=40)
    for step in (1, 2):
        clock.now += 60.0
        sink.log(step, STEP)
    sink.close()
    header, *lines = output.getvalue().splitlines()
    assert len(lines) == 2
    assert len({len(line) for line in (header, *lines)}) == 1
    cells = lines[1].split()
    assert cells == [
        "2/100",
        "0.412",
        "–",
        "812",
        "3.1%",
        "0.25",
        "1.2e-05",
        "12,346",
        "41.2",
        "1:38:00",
    ]
    for title in ("step", "reward", "held-out", "tokens/s", "left"):
        assert title in header
        end = header.index(title) + len(title)
        assert lines[0][end - 1] != " " and lines[0][end : end + 1] in ("", " ")


def test_the_header_comes_back():
    sink, output, _ = sink_and_output()
    for step in range(1, 2 * HEADER_EVERY + 2):
        sink.log(step, STEP)
    lines = output.getvalue().splitlines()
    headers = [i for i, line in enumerate(lines) if "reward" in line]
    assert headers == [0, HEADER_EVERY + 1, 2 * HEADER_EVERY + 2]


def test_no_control_sequences_outside_a_terminal():
    sink, output, _ = sink_and_output()
    sink.log(0, {**STEP, "eval/math[bold]/accuracy": 0.5})
    sink.close()
    assert "\x1b" not in output.getvalue()
    assert "math[bold] 0.500" in output.getvalue()  # not taken for markup


def test_evaluations_are_not_steps():
    sink, output, _ = sink_and_output()
    sink.log(0, {"eval/math500/accuracy": 0.31, "eval/aime24/accuracy": 0.1})
    sink.log(1, STEP)
    sink.log(2, {**STEP, "eval/math500/accuracy": 0.5})
    lines = output.getvalue().splitlines()
    assert lines[0] == "held-out accuracy after 0 steps: math500 0.310, aime24 0.100"
    assert lines[2].split()[2] == "–" and lines[3].split()[2] == "0.500"
    assert lines[4] == "held-out accuracy after 2 steps: math500 0.500"


def test_held_out_accuracy_is_the_unweighted_mean():
    assert (
        held_out_accuracy({"eval/a/accuracy": 0.2, "eval/b/accuracy": 0.6, "eval/a/length": 9.0})
        == 0.4
    )
    assert held_out_accuracy(STEP) is None


def test_remaining_time_follows_the_last_steps():
    sink, _, clock = sink_and_output(num_steps=100, start_step=11)
    assert sink.remaining_s() is None
    clock.now = 300.0  # the first step also warmed up
    sink.log(11, STEP)
    assert sink.remaining_s() == 300.0 * 89
    for step in range(12, 61):
        clock.now += 2.0
        sink.log(step, STEP)
    assert sink.remaining_s() == pytest.approx(2.0 * 40)
    sink.log(60, {"eval/a/accuracy": 0.5})
    assert sink.remaining_s() == pytest.approx(2.0 * 40)


def test_a_resumed_run_starts_where_it_stopped():
    _, output, _ = sink_and_output(terminal=True, start_step=11)
    assert "step 10/100" in output.getvalue()
    _, output, _ = sink_and_output(terminal=True)
    assert "step 0/100" in output.getvalue()


def test_missing_and_undefined_values_show_as_nothing():
    sink, output, _ = sink_and_output()
    sink.log(1, {"reward/mean": float("nan"), "time/step_s": 1.0})
    assert output.getvalue().splitlines()[1].split()[1:3] == ["–", "–"]


def test_pretraining_has_its_own_columns():
    sink, output, _ = sink_and_output(columns=PRETRAIN_COLUMNS)
    sink.log(1, {"policy/loss": 2.34567, "policy/lr": 1e-3, "time/step_s": 0.5})
    header, line = output.getvalue().splitlines()
    assert "loss" in header and "reward" not in header
    assert line.split()[:4] == ["1/100", "2.3457", "–", "1.00e-03"]


def test_the_terminal_panel_shows_where_the_run_is():
    sink, output, clock = sink_and_output(terminal=True, width=100)
    sink.log(0, {"eval/math500/accuracy": 0.25})
    for step in range(3):
        clock.now += 10.0
        sink.log(step + 1, {**STEP, "reward/mean": 0.1 * (step + 1)})
    sink.log(3, {"eval/math500/accuracy": 0.75})
    sink.close()
    last = output.getvalue().rpartition("╭")[2]
    for part in ("run", "step 3/100", "left 16:10", "0.300", "first 0.250, best 0.750", "0.750"):
        assert part in last
    assert all(len(line) <= 100 for line in last.splitlines() if "\x1b" not in line)


@pytest.mark.parametrize("width", [20, 40, 300])
def test_the_panel_fits_any_terminal(width):
    sink, output, _ = sink_and_output(terminal=True, width=width)
    for step in range(3):
        sink.log(step, STEP)
    sink.close()
    assert "step" in output.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (5.4, "00:05"), (245, "04:05"), (3723, "1:02:03"), (90123, "1 day, 1:02:03")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
