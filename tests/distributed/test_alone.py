"""Runs without torchrun: two processes at the same time, two runs in each."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_zero.launch_args import JOB_VARIABLES
from tests.launch import ENVIRONMENT, REPOSITORY

WORKER = Path(__file__).with_name("alone_worker.py")


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["policy/loss"] for line in lines]


def test_runs_alone_do_not_meet(tmp_path: Path) -> None:
    """Each has a port of its own, and all compute the same."""
    environment = os.environ | ENVIRONMENT
    for name in JOB_VARIABLES:
        environment.pop(name, None)
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path / side)],
            cwd=REPOSITORY,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for side in ("left", "right")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-4000:]
    assert all("REFUSED documents.source='none.txt'" in output for output in outputs)
    places = ("left/first", "left/second", "right/first", "right/second")
    runs = [losses(tmp_path / place) for place in places]
    assert len(runs[0]) == 2 and all(run == runs[0] for run in runs)
