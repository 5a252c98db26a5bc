"""Every family's logits and weights against transformers' on the same checkpoint, packed, sharded.

Two experts' scores of a token can be so close that rounding decides; the tiny routers are made
decisive, so that a difference means a difference in the mathematics.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import families, tiny
from tests.launch import REPOSITORY, torchrun

ONE, TP, TP_SP, PP = "1.1.0.1.1", "2.1.0.1.1", "2.1.1.1.1", "1.2.0.1.1"
EP, TP_EP, TP_ETP = "1.1.0.2.1", "2.1.1.2.1", "2.1.1.1.2"
MODELS = families.FAMILIES | families.STRETCHED
IS_MOE = {name: "num_experts_per_tok" in changes for name, (_, changes) in MODELS.items()}
CASES = [
    (name, text)
    for name, is_moe in IS_MOE.items()
    # qwen2 and qwen3_moe in all; the others, whose layouts are the same code, in the most unlike
    for text in (
        ([ONE, PP, EP, TP_EP, TP_ETP] if name == "qwen3_moe" else [ONE, PP, TP_EP])
        if is_moe
        else ([ONE, TP, TP_SP, PP] if name == "qwen2" else [ONE, TP_SP, PP])
    )
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[tuple[str, str], tuple[torch.Tensor, dict]]:
    """Logits at the response positions and all weights, by (family, layout or "hf")."""
    directory: Path = tmp_path_factory.mktemp("logits")
    found = {}
    for name in MODELS:
        model = families.write(name, directory / name / "hf")
        rows = []
        with torch.no_grad():
            for sample in tiny.samples():
                ids = torch.tensor([sample.token_ids[:-1]])
                rows.append(model(ids).logits[0, sample.prompt_length - 1 :])
        found[name, "hf"] = torch.cat(rows), load_file(directory / name / "hf/model.safetensors")
    worker = REPOSITORY / "tests" / "parity" / "logits_worker.py"
    for nproc in (1, 2):
        cases = [f"{name}:{text}" for name, text in CASES if (text == ONE) == (nproc == 1)]
        torchrun(nproc, worker, directory, *cases)
    for name, text in CASES:
        found[name, text] = torch.load(directory / name / f"{text}.pt")
    return found


@pytest.mark.parametrize(("name", "text"), CASES)
def test_logits_equal_transformers(outputs, name: str, text: str) -> None:
    expected, ours = outputs[name, "hf"][0], outputs[name, text][0]
    assert ours.shape == expected.shape and ours.size(1) == 131
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error.item() <= 1e-5
    # and in most places much better: one layer's mistake would show everywhere
    assert (ours - expected).square().mean().sqrt() / expected.std() <= 2e-6


@pytest.mark.parametrize(("name", "text"), CASES)
def test_export_equals_what_was_loaded(outputs, name: str, text: str) -> None:
    stored, exported = outputs[name, "hf"][1], outputs[name, text][1]
    assert sorted(exported) == sorted(stored)
    for key, tensor in stored.items():
        assert torch.equal(exported[key], tensor), key
