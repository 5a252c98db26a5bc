"""megatron_zero.node: what the launcher scripts refuse in one sentence, and what they choose."""

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_zero import node

ROOT = Path(__file__).parents[2]
TINY = ["math_smoke", "model.tokenizer=characters"]


@pytest.fixture
def port_in_use():
    """A port of this machine where something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORAGE", "HEAD_TIMEOUT_S", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def start(script: str, words: "list[str]", **settings: str) -> subprocess.CompletedProcess:
    """A launcher script as a user starts it."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | settings
    return subprocess.run(
        [str(ROOT / "launchers" / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_free_port_of_this_machine_is_a_place_to_meet(free_port: int) -> None:
    node.check_meeting(f"127.0.0.1:{free_port}")
    node.check_meeting(f"[::1]:{free_port}")
    node.check_meeting(f"{socket.gethostname()}:{free_port}")


@pytest.mark.parametrize("port", ["0", "65536", "x", ""])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(ValueError, match=rf"RDZV_PORT='{port}': must be a port, 1 to 65535"):
        node.check_meeting(f"127.0.0.1:{port}")


def test_a_port_that_something_else_has_is_refused(port_in_use, monkeypatch) -> None:
    monkeypatch.setattr(node, "STORE_TIMEOUT_S", 0.3)
    with pytest.raises(ValueError, match=rf"RDZV_PORT={port_in_use}: something that is not torchr"):
        node.check_meeting(f"127.0.0.1:{port_in_use}")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b""])
def test_a_port_where_another_protocol_answers_is_refused_quietly(answer, monkeypatch, capfd):
    """torch prints a page about each wrong answer, and asks again until its time is over."""
    monkeypatch.setattr(node, "STORE_TIMEOUT_S", 0.5)
    num_threads = threading.active_count()

    def serve(server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:  # the test is over
                return
            with client:
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        serving = threading.Thread(target=serve, args=(server,), daemon=True)
        serving.start()
        with pytest.raises(ValueError, match=rf"RDZV_PORT={port}: something that is not torchrun"):
            node.check_meeting(f"127.0.0.1:{port}")
        server.shutdown(socket.SHUT_RDWR)
        serving.join()
    assert capfd.readouterr().err == ""
    assert multiprocessing.active_children() == []
    # none is left inside torch: the process could not end
    assert threading.active_count() <= num_threads


def test_a_port_may_be_shared_with_another_job(monkeypatch) -> None:
    from torch.distributed import TCPStore

    monkeypatch.setattr(node, "STORE_TIMEOUT_S", 5.0)
    other_job = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    node.check_meeting(f"127.0.0.1:{other_job.port}")


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an address of this machine count as another's."""
    monkeypatch.setattr(node, "is_this_machine", lambda host: False)


def test_a_head_node_that_does_not_answer_is_named_in_time(free_port, monkeypatch) -> None:
    elsewhere(monkeypatch)
    monkeypatch.setenv("HEAD_TIMEOUT_S", "0.2")
    start_s = time.monotonic()
    message = rf"HEAD_NODE='127\.0\.0\.9': no answer on port {free_port} in 0\.2 s \(Connection ref"
    with pytest.raises(ValueError, match=message):
        node.check_meeting(f"127.0.0.9:{free_port}")
    assert time.monotonic() - start_s < 5
    assert node.HEAD_TIMEOUT_S + node.STORE_TIMEOUT_S < 60  # within a minute


def test_a_head_node_may_start_later(free_port, monkeypatch) -> None:
    elsewhere(monkeypatch)
    servers = []

    def listen() -> None:
        servers.append(socket.create_server(("127.0.0.1", free_port)))

    threading.Timer(0.3, listen).start()
    assert node.find_head("127.0.0.1", free_port, 20) is False
    servers[0].close()


def test_a_head_node_may_learn_its_own_name_late(free_port, monkeypatch) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(node, "is_this_machine", lambda host: next(answers))
    assert node.find_head("127.0.0.1", free_port, 20) is True


def test_this_machine_is_known_by_its_addresses() -> None:
    assert node.is_this_machine("127.0.0.9") and node.is_this_machine(socket.gethostname())
    assert not node.is_this_machine("192.0.2.1")  # an address for documentation; nothing is sent


@pytest.mark.parametrize(("visible", "chosen"), [("", "1"), ("0,1,3", "3"), ("-1", "1")])
def test_processes_are_chosen_by_the_gpus_there_are(monkeypatch, capsys, visible, chosen) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = node.with_num_processes(["--nproc-per-node", "", "--standalone"])
    assert options == ["--nproc-per-node", chosen, "--standalone"]
    assert f"NPROC_PER_NODE is not set: {chosen} process" in capsys.readouterr().out
    assert node.with_num_processes(["--nproc-per-node", "5"])[1] == "5"
    assert capsys.readouterr().out == ""


def test_a_relative_run_directory_is_one_of_the_storage(tmp_path, monkeypatch) -> None:
    assert node.on_job_storage("train", TINY) == TINY
    monkeypatch.setenv("STORAGE", str(tmp_path))
    assert node.on_job_storage("train", TINY) == [*TINY, f"runs_dir={tmp_path}/runs"]
    inside = [*TINY, f"runs_dir={tmp_path}/mine"]
    assert node.on_job_storage("train", inside) == inside
    for outside in ("/elsewhere", f"{tmp_path}/../elsewhere", "../elsewhere"):
        with pytest.raises(ValueError, match=r"runs_dir=.*elsewhere.*must be under STORAGE="):
            node.on_job_storage("train", [*TINY, f"runs_dir={outside}"])
    with pytest.raises(ValueError, match="runs_dir='sub': must be under STORAGE="):
        node.on_job_storage("train", [*TINY, "--run-dir", "sub/run"])  # it has the last word
    monkeypatch.setenv("STORAGE", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"STORAGE=.*must be an absolute folder that is there"):
        node.on_job_storage("train", TINY)


@pytest.mark.parametrize(
    ("settings", "words", "sentence"),
    [
        ({"NPROC_PER_NODE": "gpu"}, TINY, "NPROC_PER_NODE='gpu': must be a whole number"),
        ({"NPROC_PER_NODE": "0"}, TINY, "NPROC_PER_NODE='0': must be a whole number, 1 or more"),
        ({"MAX_RESTARTS": "-1"}, TINY, "MAX_RESTARTS='-1': must be a whole number, 0 or more"),
        ({"JOIN_TIMEOUT_S": "10m"}, TINY, "JOIN_TIMEOUT_S='10m': must be a whole number"),
        ({"COMMAND": "trian"}, TINY, "COMMAND='trian': must be one of train, pretrain"),
        ({}, ["math_smok"], "math_smok: no such recipe"),
        ({"STORAGE": "/"}, [*TINY, "runs_dir=/a/b", "name=x", "num_steps=0"], "num_steps=0: must"),
    ],
)
def test_one_node_refuses_in_one_sentence(settings, words, sentence) -> None:
    result = start("one_node.sh", words, **{"NPROC_PER_NODE": "1"} | settings)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sentence}") and result.stderr.count("\n") == 1


def test_the_number_of_nodes_is_one(tmp_path: Path) -> None:
    node.check_numbers(["--nnodes", "4", "--nproc-per-node", "8", "--max-restarts", "0"])
    for wrong in ("0", "1:4", "two", ""):
        with pytest.raises(ValueError, match=rf"NNODES='{wrong}': must be a whole number, 1 or"):
            node.check_numbers(["--nnodes", wrong])


def test_an_interpreter_without_torch_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        node.main(["--standalone", "--nproc-per-node", "1", "-m", "megatron_zero.train", *TINY])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: PYTHON='{sys.executable}': has no torch: activate the envi")


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "45s"])
def test_a_wait_without_an_end_is_refused(free_port, monkeypatch, seconds) -> None:
    monkeypatch.setenv("HEAD_TIMEOUT_S", seconds)
    with pytest.raises(ValueError, match=f"HEAD_TIMEOUT_S='{seconds}': must be a number of sec"):
        node.check_meeting(f"127.0.0.1:{free_port}")


def test_one_node_needs_no_setting_on_a_cpu(tmp_path: Path) -> None:
    """Through torchrun to a rank, which has a mistake of its own to report."""
    words = ["math_smoke", "model.tokenizer=/nowhere"]
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "STORAGE": str(tmp_path)}
    result = start("one_node.sh", words, **settings)
    assert result.stdout.startswith("NPROC_PER_NODE is not set: 1 process, no GPU is visible\n")
    assert result.stderr == "error: model.tokenizer='/nowhere': no such folder\n"
    assert result.returncode == 2
    assert list(tmp_path.glob("runs/logs/*/attempt_0/0/stderr.log"))


def test_many_nodes_names_a_head_node_that_is_unknown() -> None:
    # a name with an empty part is not looked up: nothing is sent
    settings = {"NNODES": "2", "HEAD_NODE": "no..host", "HEAD_TIMEOUT_S": "0.1"}
    result = start("many_nodes.sh", TINY, **settings, NPROC_PER_NODE="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: HEAD_NODE='no..host': no answer on port")
    assert result.stderr.count("\n") == 1


def test_many_nodes_names_a_port_that_is_in_use(port_in_use: int) -> None:
    """The real script: torchrun itself would wait there for ever."""
    settings = {"NNODES": "2", "HEAD_NODE": "localhost", "RDZV_PORT": str(port_in_use)}
    result = start("many_nodes.sh", TINY, **settings, NPROC_PER_NODE="1")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: RDZV_PORT={port_in_use}: something that is not torchr")
    assert result.stderr.count("\n") == 1


def test_nodes_that_do_not_come_are_told_of(free_port: int, tmp_path: Path) -> None:
    settings = {"NNODES": "2", "HEAD_NODE": "127.0.0.1", "RDZV_PORT": str(free_port)}
    settings |= {"NPROC_PER_NODE": "1", "JOIN_TIMEOUT_S": "1", "LOG_DIR": str(tmp_path)}
    result = start("many_nodes.sh", TINY, **settings)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    where = f"error: the job's 2 nodes did not meet at 127.0.0.1:{free_port}"
    assert last.startswith(f"{where}, or lost one another: not all of them came in time")
    assert "Traceback" not in result.stderr
