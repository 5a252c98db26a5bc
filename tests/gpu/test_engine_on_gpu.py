"""vLLM beside the policy on one GPU: one distribution in bf16; asleep, it gives its memory back."""

import json
from typing import Any

import pytest

from tests.launch import REPOSITORY, torchrun_anew


@pytest.fixture(scope="module")
def results(tmp_path_factory, vllm) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engine") / "results.json"
    torchrun_anew(1, REPOSITORY / "tests" / "gpu" / "engine_worker.py", out, timeout_s=600)
    print(json.loads(out.read_text())["memory"])
    return json.loads(out.read_text())


def test_engine_and_policy_agree_in_bf16_after_every_sync(results) -> None:
    for sampled in results["sampled"]:
        assert 0 <= sampled["kl"] <= 1e-3  # a run stops at mismatch.max_kl, 0.02
        assert sampled["max_abs"] <= 0.1
    tokens = [sampled["tokens"] for sampled in results["sampled"]]
    assert tokens[0] != tokens[1]  # the second push brought other weights


def test_an_offloaded_optimizer_gives_its_memory_back(results) -> None:
    """After the first step: float32 gradients, weights and two moments, 16 bytes a parameter."""
    memory = results["memory"]
    for version in (2, 3):
        freed = memory[f"asleep {version}"] - memory[f"offloaded {version}"]
        assert freed >= 0.8 * results["state_gib"] - 0.01


def test_an_engine_asleep_gives_its_memory_back_and_takes_it_again(results) -> None:
    memory, engine_gib = results["memory"], 0.2 * results["total_gib"]
    for version in (1, 2, 3):
        assert memory[f"awake {version}"] - memory["policy"] >= 0.5 * engine_gib
        # what stays: workspaces and loaded kernels, not weights and not the cache
        assert memory[f"asleep {version}"] - memory["policy"] <= 2
    assert memory["asleep 3"] - memory["asleep 1"] <= 0.1  # nothing piles up
