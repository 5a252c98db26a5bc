"""Chunked, vocabulary-parallel logprobs against softmax in float64, values and gradients."""

from pathlib import Path

import pytest
import torch

from tests.distributed.logprobs_worker import HIDDEN, TEMPERATURE, VOCAB, inputs
from tests.launch import REPOSITORY, torchrun

WORKER = REPOSITORY / "tests" / "distributed" / "logprobs_worker.py"
BOUNDS = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 2e-2}
CASES = [(4, "float64"), (1, "float64"), (1, "float32"), (1, "bfloat16")]


@pytest.mark.parametrize(("nproc", "dtype"), CASES)
def test_values_and_gradients_equal_the_full_softmax(
    tmp_path: Path, nproc: int, dtype: str
) -> None:
    torchrun(nproc, WORKER, tmp_path / "out.pt", dtype)
    values, entropy, grad_hidden, grad_weight = torch.load(tmp_path / "out.pt")
    assert values.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    hidden, weight, labels, a, b = (x.double() for x in inputs(getattr(torch, dtype)))
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p = (hidden @ weight.t() / TEMPERATURE).log_softmax(-1)
    expected = log_p.gather(1, labels.long()[:, None])[:, 0]
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    (a * expected + b * expected_entropy).sum().backward()
    bound = BOUNDS[dtype]
    for found, wanted in (
        (values, expected),
        (entropy, expected_entropy),
        (grad_hidden, hidden.grad),
        (grad_weight[:VOCAB], weight.grad),
    ):
        scale = wanted.abs().max()
        assert (found.double() - wanted).abs().max() <= bound * scale
    assert grad_weight.shape[1] == HIDDEN and not grad_weight[VOCAB:].any()
