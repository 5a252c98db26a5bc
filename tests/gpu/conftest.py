"""Tests that need a CUDA device: skipped, with the reason, where there is none."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The hook of a folder's conftest sees all items, not the folder's only.
    here = [item for item in items if item.path.is_relative_to(HERE)]
    for item in here:
        item.add_marker("gpu")
    if here:
        import torch

        if not torch.cuda.is_available():
            for item in here:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def transformer_engine() -> None:
    """For tests of its layers."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")


@pytest.fixture(scope="session")
def vllm() -> None:
    """For tests of the engine."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
