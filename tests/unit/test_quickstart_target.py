"""`make quickstart`: what it starts, in which order, and where `runs/quickstart` leads.

The program is replaced by one that writes down how it was called and makes the folders of a run;
what it does itself is tested elsewhere.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """#!/bin/sh
echo "$@" >> calls
case "$1" in
  pretrain) run=quickstart_base; step=step_000500 ;;
  train) for word; do run="${word#name=}"; done; step=step_000080 ;;
esac
mkdir -p "runs/$run/hf/$step" && touch "runs/$run/hf/$step/config.json"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / ".venv" / "bin" / "megatron-zero"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return tmp_path


def make_quickstart(checkout: Path, *arguments: str) -> str:
    command = ["make", "quickstart", "PYTHON=true", *arguments]  # the environment is there
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_twice_gives_two_runs_and_the_name_of_the_newest(checkout: Path) -> None:
    runs = checkout / "runs"
    said = make_quickstart(checkout)
    assert "eval runs/quickstart --benchmarks" in said
    first = (runs / "quickstart").resolve().name
    assert (runs / "quickstart" / "hf" / "step_000080" / "config.json").exists()
    make_quickstart(checkout, "NEWEST=quickstart_later")  # names have the second in them
    second = (runs / "quickstart").resolve().name
    calls = (checkout / "calls").read_text().splitlines()
    assert calls == [
        "pretrain quickstart_base --nproc 2 --resume",  # once
        f"train quickstart --nproc 2 name={first}",
        f"train quickstart --nproc 2 name={second}",
    ]
    assert first != second
    assert {path.name for path in runs.iterdir()} == {
        "quickstart_base",
        "quickstart",
        first,
        second,
    }


def test_a_base_model_that_was_interrupted_is_made(checkout: Path) -> None:
    (checkout / "runs" / "quickstart_base" / "hf").mkdir(parents=True)
    make_quickstart(checkout)
    assert "pretrain" in (checkout / "calls").read_text()


def test_a_run_that_has_the_name_stays_and_the_new_one_is_named(checkout: Path) -> None:
    (checkout / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    said = make_quickstart(checkout)
    (new,) = (checkout / "runs").glob("quickstart_[0-9]*")
    assert f"eval runs/{new.name} --benchmarks" in said and "eval runs/quickstart " not in said
    assert [path.name for path in (checkout / "runs" / "quickstart").iterdir()] == ["checkpoints"]
