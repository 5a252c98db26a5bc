"""`megatron-zero eval` on a small model: killed half-way and continued, it ends as if it never was.

Two engine starts: the command line's, which is killed, and that of a worker, which ends what was
killed, does the whole of it elsewhere, and draws its samples once more, in one batch.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from megatron_zero.data.datasets import BENCHMARKS
from tests import tiny
from tests.launch import ENVIRONMENT, REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "distributed" / "benchmarks_worker.py"
SETTINGS = ["--template", "qwen_math", "--max-problems", "2", "--max-tokens", "12", "--n", "4"]
SETTINGS += ["--temperature", "1", "--save-every", "8", "model.dtype=fp32"]
NUM_GREEDY, NUM_RESPONSES = 2 * len(BENCHMARKS), 2 * len(BENCHMARKS) * (1 + 4)


def write_model(directory: Path, tokenizer_dir: Path) -> None:
    """Random weights, the real tokenizer: 10 M parameters, nearly all of them embeddings."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    config = tiny.hf_config(tied=True, vocab_size=151936, **sizes) | {"eos_token_id": 151643}
    config |= {"max_position_embeddings": 4096}
    del config["model_type"], config["architectures"]
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    # what a model recommends for sampling; nothing of it may be followed unasked
    recommended = {"do_sample": True, "temperature": 0.01, "top_p": 0.01, "top_k": 1, "min_p": 0.9}
    recommended |= {"repetition_penalty": 5.0, "max_new_tokens": 3}
    (directory / "generation_config.json").write_text(json.dumps(recommended))


def kill_half_way(arguments: "list[str]", responses: Path) -> int:
    """Start the command line, kill all of its processes; how many responses were written."""
    command = [sys.executable, "-m", "megatron_zero.cli", "eval", *arguments]
    log = responses.parent.with_suffix(".log")
    options = {"cwd": REPOSITORY, "env": os.environ | ENVIRONMENT, "stderr": subprocess.STDOUT}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, **options)
    deadline = time.monotonic() + 200
    while not responses.exists() or responses.read_bytes().count(b"\n") < NUM_RESPONSES // 3:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)
    torchrun_process = psutil.Process(process.pid)
    # the ranks first: without torchrun they would go on by themselves
    for each in [*torchrun_process.children(recursive=True), torchrun_process]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a verifier worker ends with its rank
            each.kill()
    process.wait()
    assert "Completed | " not in log.read_text()  # a start prints our lines only
    return responses.read_bytes().count(b"\n")


@pytest.fixture(scope="module")
def results(tmp_path_factory, shared_dir: Path, qwen_tokenizer_dir: Path) -> Path:
    """A folder with `continued`, `whole`, `at_once.jsonl`, `narrow.json`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model, whole = folder / "model", folder / "whole"
    write_model(model, qwen_tokenizer_dir)
    arguments = [str(model), "--data-dir", str(shared_dir / "data"), *SETTINGS, "--out"]
    num_written = kill_half_way(
        [*arguments, str(folder / "continued")], folder / "continued" / "qwen_math.jsonl"
    )
    assert NUM_RESPONSES // 3 <= num_written < NUM_RESPONSES
    assert not (folder / "continued" / "qwen_math.json").exists()
    outs = [folder / name for name in ("continued", "whole", "at_once.jsonl", "narrow.json")]
    output = torchrun(1, WORKER, *outs, *arguments, whole)
    # the continued one did not begin at the beginning, the whole one did
    assert output.count(f"qwen_math, greedy: 8 of 10 problems, 8 of {NUM_RESPONSES} responses") == 1
    last = f"qwen_math, sampled: 10 of 10 problems, {NUM_RESPONSES} of {NUM_RESPONSES} responses"
    assert output.count(last) == 2
    # and said what it was doing before its first responses
    for phase in ("joining the other processes; prompts", "rollout engine", "qwen_math: 50 respon"):
        assert f"s] {phase}" in output
    damaged = "HF tensor model.norm.weight holds NaN or infinity, in 1 of 64 values"
    assert f"DAMAGED /model.safetensors: {damaged}" in output
    return folder


def test_killed_and_continued_is_the_same_byte_for_byte(results: Path) -> None:
    names = ["qwen_math.json", "qwen_math.jsonl", "settings.json", "table.md"]
    for folder in ("continued", "whole"):
        assert sorted(p.name for p in (results / folder).glob("[!.]*")) == names
    for name in names:
        continued, whole = ((results / folder / name) for folder in ("continued", "whole"))
        assert continued.read_bytes() == whole.read_bytes(), name


def test_every_benchmark_is_there_greedy_and_sampled(results: Path) -> None:
    records = [json.loads(line) for line in (results / "whole" / "qwen_math.jsonl").open()]
    assert len(records) == NUM_RESPONSES
    assert [r["temperature"] for r in records] == [0.0] * NUM_GREEDY + [1.0] * 4 * NUM_GREEDY
    keys = {(r["benchmark"], r["index"], r["temperature"], r["sample"]) for r in records}
    assert len(keys) == NUM_RESPONSES and {key[0] for key in keys} == set(BENCHMARKS)
    assert all(r["num_tokens"] == 12 or not r["truncated"] for r in records)
    assert (
        len({r["output"] for r in records[NUM_GREEDY:]}) > 35
    )  # every sample has a seed of its own
    assert all(r["prompt"].startswith("<|im_start|>system\nPlease reason") for r in records)
    numbers = json.loads((results / "whole" / "qwen_math.json").read_text())
    for mode, n in (("greedy", 1), ("sampled", 4)):
        by_name = numbers["results"][mode]
        assert list(by_name) == [*BENCHMARKS, "average"]
        assert all(by_name[name]["num_samples"] == n for name in BENCHMARKS)
        truncated = [r["truncated"] for r in records if (r["temperature"] > 0) == (n > 1)]
        value = by_name["average"]["metrics"]["truncated_frac"][0]
        assert value == pytest.approx(sum(truncated) / len(truncated))
    header = (results / "whole" / "table.md").read_text().splitlines()[0]
    assert [c.strip() for c in header.split("|")[3:-1]] == [*BENCHMARKS, "average"]


def test_likeliest_tokens_alone_are_drawn_where_it_is_asked_for_and_only_there(results: Path):
    """One token to choose from is greedy; the model's own recommendation of just that is not."""
    records = [json.loads(line) for line in (results / "whole" / "qwen_math.jsonl").open()]
    first = [records[0]["output"]] * 4 + [records[1]["output"]] * 4
    narrow = json.loads((results / "narrow.json").read_text())
    sampled = [r["output"] for r in records[NUM_GREEDY : NUM_GREEDY + 8]]
    assert narrow["top_k=1"] == narrow["top_p=1e-6"] == first
    for outputs in (narrow["top_k=4"], narrow["top_p=0.0005"], sampled):
        assert len(set(outputs)) == 8 and not set(outputs) & set(first)
    assert narrow["top_k=4"] != sampled != narrow["top_p=0.0005"]
    settings = json.loads((results / "whole" / "settings.json").read_text())
    assert (settings["evaluation.top_p"], settings["evaluation.top_k"]) == (1.0, 0)
    table = (results / "whole" / "table.md").read_text()
    assert table.endswith("\nsampled: num_samples 4, temperature 1.0, top_p 1.0, top_k 0\n")
    assert "| sampled maj@4" in table


def test_responses_do_not_depend_on_what_they_are_drawn_with(results: Path) -> None:
    at_once = (results / "at_once.jsonl").read_text().splitlines()
    whole = (results / "whole" / "qwen_math.jsonl").read_text().splitlines()
    assert len(at_once) == 4 * NUM_GREEDY and whole[NUM_GREEDY:] == at_once
