"""Transformer Engine's layers against the local ones on the same packed batch, on one GPU.

The reference is the local layers in float32, themselves held against transformers. In bf16 both
kinds round; Transformer Engine may be further from the reference than the local layers are, but
not by much.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zero import doctor
from tests import families, tiny
from tests.launch import REPOSITORY, torchrun_anew

FAMILIES = ["qwen2", "qwen3", "llama", "qwen3_moe"]  # biases; q and k norms; RoPE; grouped experts
WORKER = REPOSITORY / "tests" / "gpu" / "spec_worker.py"


def run(directory: Path, layers: str, dtype: str) -> dict[str, Any]:
    """Results by family; m2000: the whole batch is packed into one microbatch."""
    words = {"fp32": "m2000", "bf16": "m2000-bf16"}[dtype]
    cases = {name: f"{layers}:{words}-{name}" for name in FAMILIES}
    torchrun_anew(1, WORKER, directory, *cases.values(), timeout_s=300)
    return {n: torch.load(directory / f"{c}.pt", map_location="cpu") for n, c in cases.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("specs")


@pytest.fixture(scope="module")
def hf_logits(directory) -> dict[str, list[torch.Tensor]]:
    """transformers' logits of each sample's response positions, on the CPU, in float32."""
    found = {}
    for name in FAMILIES:
        model = families.write(name, directory / name)
        with torch.no_grad():
            found[name] = [
                model(torch.tensor([s.token_ids[:-1]])).logits[0, s.prompt_length - 1 :]
                for s in tiny.samples()
            ]
    return found


@pytest.fixture(scope="module")
def reference(directory, hf_logits) -> dict[str, Any]:
    return run(directory, "local", "fp32")


@pytest.fixture(scope="module")
def local_bf16(directory, hf_logits) -> dict[str, Any]:
    return run(directory, "local", "bf16")


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def fused(request, directory, hf_logits, transformer_engine) -> tuple[str, dict[str, Any]]:
    return request.param, run(directory, "transformer_engine", request.param)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| relative to |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradient_distances(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """By parameter, for those that have a gradient."""
    assert a["gradients"].keys() == b["gradients"].keys()
    return {
        name: distance(a["gradients"][name], gradient)
        for name, gradient in b["gradients"].items()
        if gradient.any()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_local_layers_give_the_logits_of_transformers(reference, hf_logits, name: str) -> None:
    result = reference[name]
    theirs = torch.cat([hf_logits[name][index] for index in result["order"]])
    assert distance(result["logits"], theirs) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_te_layers_agree_with_local_ones(fused, reference, local_bf16, name: str) -> None:
    dtype, results = fused
    ours, expected = results[name], reference[name]
    if "refused" in ours:
        assert "attention" in ours["refused"], ours["refused"]
        pytest.skip(f"Transformer Engine has no {dtype} attention for packed sequences")
    assert ours["kernels"]["layers"] == "transformer_engine"
    assert "transformer_engine" in ours["kernels"]["optimizer"]
    assert expected["kernels"]["layers"] == "local"
    errors = gradient_distances(ours, expected)
    if dtype == "fp32":
        assert distance(ours["logits"], expected["logits"]) <= 1e-5
        assert max(errors.values()) <= 1e-4, max(errors, key=errors.__getitem__)
        return
    local = local_bf16[name]
    bound = 1.5 * distance(local["logits"], expected["logits"]) + 1e-3
    assert distance(ours["logits"], expected["logits"]) <= bound <= 0.05
    local_errors = gradient_distances(local, expected)
    for parameter, error in errors.items():
        assert error <= 2 * local_errors[parameter] + 0.01, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_sequences_do_not_see_one_another(fused, reference, name: str) -> None:
    for result in (fused[1][name], reference[name]):
        if "refused" not in result:
            assert result["moved"]["neighbours"] <= 1e-6
            assert result["moved"]["own"] > 1e-2


def test_the_doctor_expected_these_kernels(fused) -> None:
    gpus, finding = doctor.find_gpus()
    assert gpus and finding.status == "ok"
    assert doctor.kernels(gpus)["layers"].startswith("Transformer Engine")
