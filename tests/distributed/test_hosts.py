"""One job on four hosts, started by launchers/; one host is cut off; the job resumes on all four.

The hosts are network namespaces (tests/hosts.py): own names and addresses, a bridge between them.
"""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_zero.observability.sinks import read_metrics
from tests import hosts
from tests.launch import REPOSITORY

REASON = hosts.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NUM_HOSTS, LOST = 4, 2
MAX_SILENCE_S, SLACK_S = 10, 20  # what the setting says; threads, torchrun and a busy machine
SETTINGS = [
    *("model.init=random", "model.path=", "model.tokenizer=characters"),
    "model.architecture.num_hidden_layers=2",
    "parallel.tensor_model_parallel_size=2",  # over two hosts each, and DP 2
    f"parallel.max_host_silence_s={MAX_SILENCE_S}",
    *("rollout.num_prompts_per_step=2", "rollout.group_size=2", "rollout.max_response_tokens=8"),
    *("batch.global_batch_size=4", "batch.skip_zero_advantage=false"),
    *("evaluation.datasets=", "checkpoint.every_num_steps=1", "checkpoint.save_hf=false"),
    "logging.tensorboard=false",
]


class Job:
    """`launchers/many_nodes.sh quickstart` on every host."""

    def __init__(self, machines: hosts.Hosts, directory: Path, name: str, *words: str) -> None:
        self.directory, self.name = directory, name
        environment = os.environ | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "NNODES": str(NUM_HOSTS),
            "NPROC_PER_NODE": "1",
            "HEAD_NODE": "host0",
            "JOB_ID": name,
            "LOG_DIR": str(directory / f"{name}_logs"),
        }
        script = str(REPOSITORY / "launchers" / "many_nodes.sh")
        run_dir = ["--run-dir", str(directory / "run")]
        self.processes = [
            machines.start(
                host,
                [script, "quickstart", *SETTINGS, *words, *run_dir],
                environment,
                directory / f"{name}_{host}.log",
            )
            for host in range(NUM_HOSTS)
        ]

    def output(self, host: int) -> str:
        return (self.directory / f"{self.name}_{host}.log").read_text()

    def status(self) -> "list[int | None]":
        return [process.poll() for process in self.processes]

    def wait(self, condition, timeout_s: float) -> float:
        """Seconds until the condition holds."""
        start = time.monotonic()
        while not condition():
            waited = time.monotonic() - start
            assert waited < timeout_s, f"{self.status()}: {self.output(0)[-4000:]}"
            time.sleep(0.2)
        return time.monotonic() - start

    def end(self) -> None:
        for process in self.processes:
            hosts.end(process)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What happened, and when."""
    directory = tmp_path_factory.mktemp("hosts")
    run_dir = directory / "run"
    with hosts.Hosts(directory, NUM_HOSTS) as machines:
        cut = Job(machines, directory, "cut", "num_steps=1000")
        try:
            second = run_dir / "checkpoints" / "step_000002"
            cut.wait(lambda: second.exists() or any(cut.status()), 200)
            assert not any(cut.status()), cut.output(0)[-4000:]
            machines.plug(LOST, into=False)
            survivors = [host for host in range(NUM_HOSTS) if host != LOST]
            ended_s = cut.wait(
                lambda: all(cut.status()[host] is not None for host in survivors), 90
            )
            statuses = [cut.status()[host] for host in survivors]
        finally:
            cut.end()
        machines.plug(LOST, into=True)
        before = read_metrics(run_dir / "metrics.jsonl")
        saved = max(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_" + "[0-9]" * 6))
        again = Job(machines, directory, "again", f"num_steps={saved + 1}", "--resume")
        try:
            again.wait(lambda: None not in again.status(), 200)
        finally:
            again.end()
    return {
        "ended_s": ended_s,
        "statuses": statuses,
        "outputs": [cut.output(host) for host in survivors],
        "again": again,
        "before": before,
        "saved": saved,
        "after": read_metrics(run_dir / "metrics.jsonl"),
        "run_dir": run_dir,
    }


def test_a_lost_host_ends_the_job_in_time_and_by_name(story: dict) -> None:
    print(f"ended {story['ended_s']:.1f} s after host{LOST} was cut off")
    assert story["ended_s"] <= MAX_SILENCE_S + SLACK_S
    assert all(status == 1 for status in story["statuses"])
    # Whichever survivor notices first ends the job; its agent's end can be the others' news.
    assert any(f"host lost: host{LOST} (on host" in output for output in story["outputs"])
    named = {name for o in story["outputs"] for name in re.findall(r"host lost: (\w+)", o)}
    assert named <= {f"host{LOST}"}


def test_the_restart_resumes_from_the_last_checkpoint(story: dict) -> None:
    again, saved = story["again"], story["saved"]
    assert again.status() == [0] * NUM_HOSTS, again.output(0)[-4000:]
    assert saved >= 2
    assert [record["step"] for record in story["after"]] == list(range(1, saved + 2))
    assert story["after"][:saved] == story["before"][:saved]  # nothing was done again
    assert (story["run_dir"] / "checkpoints" / f"step_{saved + 1:06d}" / "metadata.json").is_file()


def test_every_rank_has_a_log_and_the_layout_is_the_one_asked_for(story: dict) -> None:
    again = story["again"]
    assert "layout: TP 2 x PP 1 x DP 2" in again.output(0)
    logs = sorted(again.directory.glob("again_logs/*/attempt_0/*/stdout.log"))
    assert len(logs) == NUM_HOSTS


def test_a_head_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Both ways: its machine says no, and no machine says anything."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "NNODES": "2",
        "HEAD_NODE": "host0",
        "HEAD_TIMEOUT_S": "1",
    }
    command = [str(REPOSITORY / "launchers" / "many_nodes.sh"), "quickstart", *SETTINGS]
    with hosts.Hosts(tmp_path, 2) as machines:
        for reason in ("Connection refused", "timed out"):
            machines.plug(0, into=reason == "Connection refused")
            output = tmp_path / f"{reason}.log"
            process = machines.start(1, command, environment, output)
            assert process.wait(30) == 2
            sentence = output.read_text().splitlines()[-1]
            waited = "error: HEAD_NODE='host0': no answer on port 29500 in 1 s"
            assert sentence.startswith(f"{waited} ({reason}): is it the first node's name")
            assert "Traceback" not in output.read_text()
