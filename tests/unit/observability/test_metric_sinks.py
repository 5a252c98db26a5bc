import json
import math
import sys
import types

import pytest

from megatron_zero.config import LoggingConfig
from megatron_zero.observability.console import ConsoleSink
from megatron_zero.observability.run_dir import RunDir
from megatron_zero.observability.sinks import (
    JsonlSink,
    Sinks,
    TensorBoardSink,
    WandbSink,
    make_sinks,
    read_metrics,
)

QUIET = LoggingConfig(console=False, tensorboard=False)


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path, first, last, start_step=0):
    sink = JsonlSink(path, start_step)
    for step in range(first, last):
        sink.log(step, {"reward/mean": step / 10})
    sink.close()


def test_one_line_per_step_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(3):
        sink.log(step, {"reward/mean": 0.1 * step, "time/step_s": 2.0})
        assert steps(path) == list(range(step + 1))  # flushed
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"step": 0, "reward/mean": 0.0, "time/step_s": 2.0}
    sink.close()


def test_parts_of_a_step_become_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(0, {"eval/math500/accuracy": 0.3})
    sink.log(0, {"reward/mean": 0.25})
    sink.log(1, {"reward/mean": 0.5})
    sink.log(1, {"eval/math500/accuracy": 0.4})
    sink.close()
    assert read_metrics(path) == [
        {"step": 0, "eval/math500/accuracy": 0.3, "reward/mean": 0.25},
        {"step": 1, "reward/mean": 0.5, "eval/math500/accuracy": 0.4},
    ]


def test_a_shorter_second_part_leaves_no_rest(tmp_path):
    sink = JsonlSink(tmp_path / "m")
    sink.log(0, {"a/b": 0.123456789012345678})
    sink.log(0, {"a/b": 1.0})
    sink.close()
    assert (tmp_path / "m").read_text() == '{"step": 0, "a/b": 1.0}\n'


def test_steps_do_not_go_back(tmp_path):
    sink = JsonlSink(tmp_path / "m")
    sink.log(4, {})
    with pytest.raises(AssertionError):
        sink.log(3, {})


@pytest.mark.parametrize("resumed", range(7))
def test_a_resumed_file_reads_like_one_that_never_stopped(resumed, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    write_steps(stopped, 0, 6)  # ran to 6, but the last checkpoint is older
    write_steps(stopped, resumed, 9, start_step=resumed)
    write_steps(whole, 0, 9)
    assert steps(stopped) == list(range(9))
    assert stopped.read_text() == whole.read_text()


def test_the_last_record_that_is_kept_may_still_grow(tmp_path):
    """A resumed run evaluates at the step it resumes after, which is in the file already."""
    path = tmp_path / "m"
    write_steps(path, 0, 6)
    sink = JsonlSink(path, 4)
    sink.log(3, {"eval/math500/accuracy": 0.5})
    sink.log(4, {"reward/mean": 0.9})
    sink.close()
    assert steps(path) == [0, 1, 2, 3, 4]
    assert read_metrics(path)[3] == {"step": 3, "reward/mean": 0.3, "eval/math500/accuracy": 0.5}


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    path = tmp_path / "m"
    write_steps(path, 0, 3)
    with path.open("a") as file:
        file.write('{"step": 3, "rew')
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2]
    write_steps(path, 3, 5, start_step=3)
    assert steps(path) == [0, 1, 2, 3, 4]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not a record of metrics: nonsense"):
        JsonlSink(path, 2)
    assert "nonsense" in path.read_text()


def test_values_that_are_not_numbers_are_null(tmp_path):
    path = tmp_path / "m"
    sink = JsonlSink(path)
    sink.log(0, {"a/nan": math.nan, "a/inf": math.inf, "a/b": 1.0})
    sink.close()
    assert json.loads(path.read_text()) == {"step": 0, "a/nan": None, "a/inf": None, "a/b": 1.0}
    (record,) = read_metrics(path)
    assert math.isnan(record["a/nan"]) and record["a/b"] == 1.0
    write_steps(path, 1, 2, start_step=1)  # null survives a resume
    assert math.isnan(read_metrics(path)[0]["a/nan"])


def test_only_rank_0_writes(tmp_path):
    everything = LoggingConfig(wandb_project="p")
    with make_sinks(everything, RunDir(tmp_path), 1, name="n", num_steps=3) as sinks:
        sinks.log(0, {"a/b": 1.0})
        assert sinks.sinks == ()
    assert list(tmp_path.iterdir()) == []


def test_metrics_jsonl_is_always_written(tmp_path):
    with make_sinks(QUIET, RunDir(tmp_path), 0, name="n", num_steps=3) as sinks:
        sinks.log(0, {"a/b": 1.0})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_sinks_that_are_asked_for(tmp_path, monkeypatch):
    fake_wandb(monkeypatch)
    logging = LoggingConfig(console=True, tensorboard=True, wandb_project="p")
    sinks = make_sinks(logging, RunDir(tmp_path), 0, name="n", num_steps=3)
    kinds = [type(sink) for sink in sinks.sinks]
    assert kinds == [JsonlSink, TensorBoardSink, WandbSink, ConsoleSink]
    sinks.close()


def test_sinks_pass_everything_on():
    seen = []

    class Recorder:
        def log(self, step, values):
            seen.append((step, values))

        def close(self):
            seen.append("closed")

    with Sinks([Recorder(), Recorder()]) as sinks:
        sinks.log(3, {"a/b": 1.0})
    assert seen == [(3, {"a/b": 1.0})] * 2 + ["closed"] * 2


def scalars(path, tag):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = loader.EventAccumulator(str(path))
    accumulator.Reload()
    return [(e.step, round(e.value, 6)) for e in accumulator.Scalars(tag)]


def test_tensorboard_drops_the_repeated_steps(tmp_path):
    path = tmp_path / "tensorboard"
    for start, end, value in ((0, 4, 1.0), (2, 5, 2.0)):
        sink = TensorBoardSink(path, start)
        for step in range(start, end):
            sink.log(step, {"reward/mean": value})
        sink.close()
    expected = [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert scalars(path, "reward/mean") == expected


@pytest.mark.parametrize("name", ["torch.utils.tensorboard", "wandb"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    logging = LoggingConfig(console=False, wandb_project="p")
    message = r"logging\.(tensorboard=True|wandb_project='p'): needs the package"
    fake_wandb(monkeypatch) if name != "wandb" else None
    with pytest.raises(ValueError, match=message):
        make_sinks(logging, RunDir(tmp_path), 0, name="n", num_steps=3)


def fake_wandb(monkeypatch) -> list:
    calls = []

    class Run:
        id = "id-1"

        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_wandb_continues_its_own_run(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    for _ in range(2):
        sink = WandbSink("project", "name", tmp_path, {"seed": 3})
        sink.log(5, {"a/b": 1.0})
        sink.close()
    first, second = (c[1] for c in calls if c[0] == "init")
    assert first["id"] is None and second["id"] == "id-1"
    assert first["project"] == "project" and first["config"] == {"seed": 3}
    assert calls[1] == ("log", 5, {"a/b": 1.0}) and calls[2] == ("finish",)
