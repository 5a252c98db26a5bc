"""The policy's logits against transformers on the same checkpoint, float32, packed and sharded."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launch import REPOSITORY, torchrun

LAYOUTS = {1: ["1.1.0"], 2: ["2.1.0", "2.1.1", "1.2.0"]}
CASES = [(tied, text) for tied in (True, False) for texts in LAYOUTS.values() for text in texts]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[tuple[bool, str], torch.Tensor]:
    """Logits at the response positions by (tied, layout); layout "hf": transformers'."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    found = {}
    for tied in (True, False):
        directory: Path = tmp_path_factory.mktemp("logits")
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**tiny.hf_config(tied=tied))).eval()
        with torch.no_grad():  # biases and norms as a trained model has them, not 0 and 1
            for param in model.parameters():
                if param.dim() == 1:
                    param.add_(0.1 * torch.randn_like(param))
        model.save_pretrained(directory / "hf")
        rows = []
        with torch.no_grad():
            for sample in tiny.samples():
                ids = torch.tensor([sample.token_ids[:-1]])
                rows.append(model(ids).logits[0, sample.prompt_length - 1 :])
        found[tied, "hf"] = torch.cat(rows)
        for nproc, texts in LAYOUTS.items():
            worker = REPOSITORY / "tests" / "parity" / "logits_worker.py"
            torchrun(nproc, worker, directory, directory / "hf", *texts)
            for text in texts:
                found[tied, text] = torch.load(directory / f"{text}.pt")
    return found


@pytest.mark.parametrize(("tied", "text"), CASES)
def test_logits_equal_transformers(outputs, tied: bool, text: str) -> None:
    expected, ours = outputs[tied, "hf"], outputs[tied, text]
    assert ours.shape == expected.shape and ours.size(1) == 131
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error.item() <= 1e-5
    # and in most places much better: one layer's mistake would show everywhere
    assert (ours - expected).square().mean().sqrt() / expected.std() <= 2e-6
