"""Objectives that look at whole responses have the same gradient in every layout and packing.

`test_gradient_layouts` does this for the token-level surrogate, against an independent reference;
here one process with everything in one microbatch is the reference, and its objective is compared
with literal formulas in `tests/unit/test_objective_family.py`.
"""

from pathlib import Path

import pytest
import torch

from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "invariance" / "objectives_worker.py"
OBJECTIVES = ("gspo", "cispo")
REFERENCE = "m2000-qwen2-1"
LAYOUTS = {
    1: ["m2000-qwen2", "m60-qwen2"],
    2: ["tp2-sp-m100-qwen2", "pp2-m60-qwen2", "cp2-m100-qwen2", "m100-qwen2"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("objectives")
    for world, layouts in LAYOUTS.items():
        cases = [f"{name}:{layout}" for name in OBJECTIVES for layout in layouts]
        torchrun(world, WORKER, directory, *cases)
    return directory


@pytest.mark.parametrize("layout", [f"{x}-{w}" for w, texts in LAYOUTS.items() for x in texts][1:])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_has_the_gradient_of_one_process(results: Path, name: str, layout: str):
    reference = torch.load(results / f"{name}:{REFERENCE}.pt")
    result = torch.load(results / f"{name}:{layout}.pt")
    loss, expected = (r["metrics"]["policy/loss"] for r in (result, reference))
    assert loss == pytest.approx(expected, rel=1e-5)
    frac, expected = (r["metrics"]["policy/clip_frac"] for r in (result, reference))
    assert frac == expected and 0.05 < frac < 0.95
    assert result["gradients"].keys() == reference["gradients"].keys()
    largest = max(g.abs().max().item() for g in reference["gradients"].values())
    for parameter, gradient in reference["gradients"].items():
        difference = (result["gradients"][parameter] - gradient).abs().max().item()
        assert difference <= 1e-5 * largest, parameter


def test_the_objectives_differ(results: Path) -> None:
    gspo, cispo = (torch.load(results / f"{n}:{REFERENCE}.pt")["gradients"] for n in OBJECTIVES)
    assert any((gspo[name] - cispo[name]).abs().max() > 1e-3 for name in gspo)
