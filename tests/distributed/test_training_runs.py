"""Whole runs through the command line, on a base model made here: learn, save, resume, export."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_zero.analysis.rollout_stats import weight_metrics
from megatron_zero.observability.rollouts import read_rollouts
from megatron_zero.observability.sinks import read_metrics
from tests.launch import REPOSITORY, run, torchrun

CLI = [sys.executable, "-m", "megatron_zero.cli"]
KEPT = ["step_5_keep", "step_000002 (copy)", "step_000009.bak", "step_latest"]  # by somebody
EASY = ["min_operand=1", "max_operand=9"]
OVERRIDES = [
    "rollout.num_prompts_per_step=8",
    "batch.global_batch_size=32",  # two optimizer steps per rollout
    "evaluation.max_prompts=16",
    "logging.rollouts_every_num_steps=2",
    "loss.kl_coef=0.01",
    "rollout.max_rounds=2",  # groups without signal are replaced
    *(f"data.arithmetic.{setting}" for setting in EASY),
]
# How the lines begin that a start prints: seconds and phase, the objective, the report.
OBJECTIVE = ("advantage", "loss", "ratio", "KL", "importance", "steps", "sampling", "truncated")
START = (
    "[",
    "stop tokens:",
    "engine and policy agree on ",
    "objective:",
    "layout:",
    "kernels:",
    "run directory:",
    *(f"  {x} " for x in OBJECTIVE),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that adds one-digit numbers, made in the way of the quickstart."""
    directory = tmp_path_factory.mktemp("runs") / "base"
    easy = [f"documents.arithmetic.{setting}" for setting in EASY]
    words = ["pretrain", "quickstart_base", "num_steps=70", *easy, "--run-dir", str(directory)]
    run([*CLI, *words, "--nproc", "2"])
    return directory


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, Path]:
    """Four steps at once, and the same run lost after its third step and resumed.

    They start from the base model's conversion to a Megatron checkpoint.
    """
    converted = base.parent / "converted"
    tool = REPOSITORY / "tools" / "convert" / "hf_to_megatron.py"
    run([sys.executable, str(tool), f"{base}/hf/step_000070", str(converted), "--verify"])
    directories = {"whole": base.parent / "whole", "halves": base.parent / "halves"}
    words = [*CLI, "train", "quickstart", f"model.path={converted}", *OVERRIDES]
    whole, halves = directories.values()
    every_two = ["num_steps=4", "checkpoint.every_num_steps=2"]
    run([*words, *every_two, "--run-dir", str(whole), "--nproc", "2"])
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "step_000004")
    shutil.rmtree(halves / "hf")
    (halves / "checkpoints" / "step_000003.incomplete").mkdir()  # what a crash leaves
    for name in KEPT:
        (halves / "checkpoints" / name).mkdir()
    lines = (halves / "metrics.jsonl").read_text().splitlines(keepends=True)
    (halves / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:40])
    output = run([*words, *every_two, "--run-dir", str(halves), "--nproc", "2", "--resume"])
    assert "engine and policy agree on" in output  # a resumed run's first sync is verified, too
    return directories


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_pretraining_learns_and_exports(base: Path) -> None:
    records = read_metrics(base / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 71))
    assert records[0]["policy/loss"] > 4 and records[-1]["policy/loss"] < 1
    # ten steps of warm-up: the first learns, the last has the whole rate
    assert records[0]["policy/lr"] == pytest.approx(3e-4, rel=1e-12)
    assert records[9]["policy/lr"] == pytest.approx(3e-3, rel=1e-12)
    assert records[10]["policy/lr"] < 3e-3
    assert (base / "checkpoints" / "step_000070" / "metadata.json").is_file()


def test_a_run_leaves_everything_behind(trained: dict[str, Path]) -> None:
    directory = trained["whole"]
    records = read_metrics(directory / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert records[0].keys() >= {"eval/arithmetic_heldout/accuracy"} <= records[4].keys()
    for record in records[1:]:
        assert record["policy/grad_norm"] > 0 and record["mismatch/kl"] < 1e-8
        assert 0 <= record["reward/mean"] <= 1 and record["response/length_mean"] > 1
        assert record["time/step_s"] >= record["time/rollout_s"] > 0
        assert 8 <= record["sampling/groups_drawn"] <= 16
    assert sum(r["sampling/groups_drawn"] for r in records[1:]) > 4 * 8  # some were replaced
    rollouts = read_rollouts(directory / "rollouts" / "step_000002.jsonl.zst")
    assert len(rollouts) == 8 and all(len(r.group.responses) == 8 for r in rollouts)
    assert all(r.policy_version == 1 for record in rollouts for r in record.group.responses)
    # two optimizer steps on two ranks weigh what the rollouts say that they should
    advantages = torch.tensor([r.advantages for r in rollouts])
    lengths = torch.tensor([[len(x.token_ids) for x in r.group.responses] for r in rollouts])
    shares = dict(enumerate((advantages.abs() * lengths).flatten().tolist()))
    groups, graded = [r.group for r in rollouts], [r.graded for r in rollouts]
    weights = weight_metrics(groups, graded, shares, max_response_tokens=96)
    assert {name: records[2][name] for name in weights} == pytest.approx(weights, abs=1e-6)
    evaluation = json.loads((directory / "eval" / "step_000004.json").read_text())
    (held_out,) = (mode["arithmetic_heldout"] for mode in evaluation["results"].values())
    how = {n: v for n, v in evaluation["settings"].items() if n.startswith("evaluation.")}
    assert how == {
        "evaluation.num_samples": 2,
        "evaluation.temperature": 1.0,
        "evaluation.top_p": 1.0,
        "evaluation.top_k": 0,
    }
    assert set(held_out["at_k"]) == {"maj@2", "pass@2"}
    assert len(held_out["problems"]) == 13  # pairs of 1..9 that are held out
    value, low, high = held_out["metrics"]["accuracy"]
    assert low <= value <= high and value == records[4]["eval/arithmetic_heldout/accuracy"]
    responses = (directory / "eval" / "step_000004.jsonl").read_text().splitlines()
    correct = [json.loads(line)["correct"] for line in responses]
    assert sum(correct) / len(correct) == pytest.approx(value)
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["kernels"]["layers"] == "local" and environment["world_size"] == 2
    assert {"config.yaml", "tensorboard", "checkpoints"} <= {p.name for p in directory.iterdir()}


def test_a_resumed_run_is_the_run_that_never_stopped(trained: dict[str, Path]) -> None:
    whole, halves = (read_metrics(trained[n] / "metrics.jsonl") for n in ("whole", "halves"))
    assert [r["step"] for r in halves] == [0, 1, 2, 3, 4]
    for a, b in zip(whole[1:], halves[1:], strict=True):
        timeless = [n for n in a if not n.startswith(("time/", "throughput/", "eval/"))]
        assert {n: a[n] for n in timeless} == {n: b[n] for n in timeless}, a["step"]
    ours, theirs = (weights(trained[n] / "hf" / "step_000004") for n in ("whole", "halves"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_lies_beside_the_checkpoints_is_left_alone(trained: dict[str, Path]) -> None:
    names = {path.name for path in (trained["halves"] / "checkpoints").iterdir()}
    assert names == {"step_000002", "step_000004", *KEPT}


def test_the_reference_policy_is_the_starting_one(trained: dict[str, Path]) -> None:
    records = read_metrics(trained["whole"] / "metrics.jsonl")[1:]
    assert records[0]["policy/kl_ref"] < records[1]["policy/kl_ref"] < records[3]["policy/kl_ref"]


def test_the_export_loads_in_transformers_and_vllm(trained: dict[str, Path]) -> None:
    worker = REPOSITORY / "tests" / "distributed" / "export_worker.py"
    texts = json.loads(
        torchrun(1, worker, trained["whole"] / "hf" / "step_000004").rsplit("RESULT ", 1)[1]
    )
    assert texts["vllm"] == texts["transformers"]
    assert len(set(texts["vllm"])) > 1 and all(texts["vllm"])  # and they say something


def test_a_finished_run_is_not_overwritten(trained: dict[str, Path]) -> None:
    words = [*CLI, "train", str(trained["whole"] / "config.yaml"), "--nproc", "2"]
    output = run(words, expect_status=2)
    assert "holds the results of a run; continue it with --resume" in output


def test_a_bound_on_the_mismatch_stops_the_run(base: Path) -> None:
    """As one process without torchrun; also what a start prints, and a crash at its end."""
    directory = base.parent / "stopped"
    words = [sys.executable, "-m", "megatron_zero.train", "quickstart", *OVERRIDES]
    words += [f"model.path={base}/hf/step_000070", "mismatch.max_kl=1e-300"]
    words += ["evaluation.datasets=", "--run-dir", str(directory)]
    output = run(words, expect_status=1, show_warnings=True)
    assert "engine and policy disagree" in output and "nothing was updated" in output
    assert read_metrics(directory / "metrics.jsonl") == []
    start, crash = output.split("Traceback (most recent call last):\n", 1)
    for line in start.splitlines():  # nothing but our own
        assert line.startswith(START), line
    last = crash.splitlines()[-1]
    assert last.startswith("error: RuntimeError: step 0: engine and policy disagree")
