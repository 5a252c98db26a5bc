"""How a job ends whose ranks fail, in real processes: the last line, the status, how soon."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_zero import config_io
from megatron_zero.config import DocumentsConfig, ModelConfig, PretrainConfig, RunConfig
from tests.launch import ENVIRONMENT, REPOSITORY

WORKER = Path(__file__).with_name("failing_worker.py")
COMMAND = [sys.executable, "-m", "megatron_zero.torchrun", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    model = ModelConfig(init="random", tokenizer="characters")
    config_io.save_config(RunConfig(name="run", model=model), path)
    return path


def start(config: Path, failing: str) -> subprocess.Popen:
    environment = os.environ | ENVIRONMENT | {"FAILING": failing, "PYTHONWARNINGS": ""}
    return subprocess.Popen(
        [*COMMAND, str(WORKER), str(config)],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(job: subprocess.Popen) -> tuple[list[str], float]:
    """What it printed after both ranks were at work, and the seconds until it ended."""
    lines = []
    while sum(line.startswith("pid ") for line in lines) < 2:
        line = job.stdout.readline()
        assert line, lines
        lines.append(line)
    started = time.monotonic()
    rest = job.communicate(timeout=60)[0].splitlines()
    pids = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    return rest, time.monotonic() - started


def test_a_mistake_that_one_rank_finds(config: Path) -> None:
    """Rank 0 waits for rank 1: it is not left there, and what it says of it is not heard."""
    job = start(config, "mistake")
    lines, seconds = end(job)
    assert len(lines) == 1 and seconds < 20
    assert lines[0].startswith("error: data.data_dir='/data': no such folder (found by rank 1 on ")
    assert job.returncode == 2


def test_a_crash_of_one_rank(config: Path) -> None:
    job = start(config, "crash")
    lines, seconds = end(job)
    assert job.returncode == 1 and seconds < 20
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert "torch.zeros(2) + torch.zeros(3)" in "\n".join(lines)
    assert lines[-1].startswith("error: rank 1 on ")
    assert ": RuntimeError: The size of tensor a (2)" in lines[-1]


def test_a_signal_ends_all_processes(config: Path) -> None:
    job = start(config, "nothing")
    lines = [job.stdout.readline()]
    while not lines[-1].startswith("pid "):
        lines.append(job.stdout.readline())
    job.send_signal(signal.SIGTERM)
    rest = job.communicate(timeout=60)[0].splitlines()
    pids = [int(line.split()[1]) for line in [*lines, *rest] if line.startswith("pid ")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert rest[-1] == "ended by SIGTERM" and job.returncode == 128 + signal.SIGTERM
    assert not any("Traceback" in line for line in rest)


def test_a_mistake_on_one_of_two_hosts_ends_both(tmp_path: Path) -> None:
    """Its data is on one of them only: the other waits for it, and ends with its sentence."""
    base = tmp_path / "run.yaml"
    data = DocumentsConfig(source="data.txt")
    model = ModelConfig(init="random", tokenizer="characters")
    config_io.save_config(PretrainConfig(name="run", model=model, documents=data), base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = []
    for host in ("complete", "lacking"):
        folder = tmp_path / host
        folder.mkdir()
        if host == "complete":
            (folder / "data.txt").write_text("text " * 100)
        command = [sys.executable, "-m", "megatron_zero.torchrun", "--nnodes=2"]
        command += ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=x"]
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", "-m", "megatron_zero.pretrain", str(base)]
        jobs.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | ENVIRONMENT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [job.communicate(timeout=90)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # torchrun ends its ranks; nothing where it has ended
    for job, output in zip(jobs, outputs, strict=True):
        last = output.splitlines()[-1]
        assert last.startswith("error: documents.source='data.txt': must be"), output
        assert job.returncode == 2 and "Traceback" not in output
