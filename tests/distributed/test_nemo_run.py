"""nemo-run for real: a run on this machine, and the newer version in an environment of its own."""

import os
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools

from megatron_zero.observability.sinks import read_metrics
from tests.launch import REPOSITORY, run

SETTINGS = [
    *("model.init=random", "model.path=", "model.tokenizer=characters"),
    "model.architecture.num_hidden_layers=2",
    *("rollout.num_prompts_per_step=2", "rollout.group_size=2", "rollout.max_response_tokens=8"),
    *("batch.global_batch_size=4", "batch.skip_zero_advantage=false", "evaluation.datasets="),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo_run"))


def test_local_runs_quickstart_to_completion(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.launch", "quickstart", "--executor", "local"]
    words = ["--nproc", "1", "--output", str(tmp_path), f"runs_dir={tmp_path}", "num_steps=2"]
    words.append("logging.warn_after_steps_without_signal=1")
    output = run([*command, *words, *SETTINGS], timeout_s=200)
    records = read_metrics(tmp_path / "quickstart" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    # a random model earns nothing, and the run says so: once, and at its end
    assert [record["reward/steps_without_signal"] for record in records] == [1, 2]
    assert output.count("nothing could be learned in the last step") == 1
    assert output.count("no signal in 2 of 2 steps: this run has learned nothing") == 1
    assert "last checkpoint" in output and "the model for transformers and vLLM" in output
    assert (tmp_path / "quickstart" / "hf" / "step_000002" / "config.json").is_file()


def test_a_local_run_that_fails_fails_the_launch(tmp_path: Path) -> None:
    """`PYTHONHOME` keeps any Python from starting: the quickest failure there is."""
    command = [sys.executable, "-m", "recipes.launch", "math_smoke", "--executor", "local"]
    words = ["--nproc", "1", "--output", str(tmp_path), "--env", "PYTHONHOME=/nowhere"]
    assert "FAILED" in run([*command, *words], timeout_s=100, expect_status=1)


@pytest.fixture(scope="module")
def launcher_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the extra `launch-only`."""
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
        runpy.run_path(str(REPOSITORY / "setup.py"))
    directory = tmp_path_factory.mktemp("launcher")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    wanted = [*arguments["extras_require"]["launch-only"], "pyyaml"]
    made = subprocess.run(
        [*pip, "install", "-q", "--no-compile", "--retries", "1", "--timeout", "10", *wanted],
        capture_output=True,
        text=True,
        timeout=280,
    )
    offline = ("name resolution", "Failed to establish", "No matching distribution", "timed out")
    if made.returncode and any(sign in made.stdout + made.stderr for sign in offline):
        pytest.skip(f"no package index: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr[-3000:]
    return python


@pytest.mark.slow
def test_the_launcher_environment_submits_without_torch(launcher_python, tmp_path) -> None:
    """nemo-run 0.11: imports, Slurm scripts, Kubeflow's own manifest; no torch, no vLLM there."""
    worker = REPOSITORY / "tests" / "distributed" / "launcher_worker.py"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [launcher_python, str(worker), str(tmp_path)],
        env=environment,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "RESULT ok" in result.stdout
