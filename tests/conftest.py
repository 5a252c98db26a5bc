"""What all tests share: how they are spread over workers, and where local data is.

`make test` runs pytest with `-n 2 --dist loadgroup`. Every test outside tests/unit, and every unit
test marked `processes`, starts several processes; they form one group, which xdist gives to one
worker, so they run one after another while the other worker goes through the unit tests.
"""

import os
from pathlib import Path

import pytest

# Before any test imports a Hugging Face package: nothing here may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).parent
SHARED = TESTS.parent.parent / "shared"  # data and tokenizers beside the checkout; may be absent


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError("xdist ignores groups with this pytest: see setup.py, `make setup`")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, -m the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS / "unit"):
            item.add_marker("processes")
        if item.get_closest_marker("processes"):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data sets and tokenizers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def qwen_tokenizer_dir(shared_dir: Path) -> Path:
    """The Qwen2.5 tokenizer's files."""
    directory = shared_dir / "tokenizers" / "qwen2.5"
    if not directory.is_dir():
        pytest.skip("needs shared/tokenizers/qwen2.5 beside the checkout")
    return directory
