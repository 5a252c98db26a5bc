"""What all tests share: how they are spread over workers, and where local data is.

`make test` runs pytest with `-n 2 --dist loadgroup`. Every test outside tests/unit, and every unit
test marked `processes`, starts several processes; they form two groups that take about equally
long, each of which xdist gives to one worker, where they run one after another.
"""

import os
from pathlib import Path

import pytest

# Before any test imports a Hugging Face package: nothing here may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

TESTS = Path(__file__).parent
FIRST_GROUP = {"invariance", "parity", "test_hosts.py", "test_nemo_run.py", "test_judge_on_vllm.py"}
SHARED = TESTS.parent.parent / "shared"  # data and tokenizers beside the checkout; may be absent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts", action="store_true", help="every layout of tests/invariance (without -n)"
    )
    parser.addoption("--write-launched", action="store_true", help="write tests/unit/launched anew")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of layouts, each against one process; and of engine against policy."""
    outcomes = [terminalreporter.stats.get(outcome, []) for outcome in ("passed", "failed")]
    properties = [dict(report.user_properties) for reports in outcomes for report in reports]
    rows = [row["layout"] for row in properties if "layout" in row]
    if rows:
        terminalreporter.write_sep("-", "relative error against one process")
        terminalreporter.write_line(f"{'layout':44}ranks     loss  gradients    weights")
        for row in rows:
            errors = (row.get(name) for name in ("loss", "gradients", "weights"))
            text = "".join(f"{'' if e is None else format(e, '.1e'):>11}" for e in errors)
            terminalreporter.write_line(f"{row['layout']:44}{row['processes']:5}{text}")
    rows = [row for row in properties if "mismatch_case" in row]
    if rows:
        terminalreporter.write_sep("-", "engine against policy, float32: KL per token")
        terminalreporter.write_line(f"{'family':44}   step 1   step 2  largest difference")
        for row in rows:
            kls = "".join(f"{kl:9.1e}" for kl in row["mismatch_kls"])
            largest = f"{row['mismatch_max_abs']:20.1e}"
            terminalreporter.write_line(f"{row['mismatch_case']:44}{kls}{largest}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError("xdist ignores groups with this pytest: see setup.py, `make setup`")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, -m the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS / "unit"):
            item.add_marker("processes")
        if item.get_closest_marker("processes"):
            first = FIRST_GROUP & {*item.path.relative_to(TESTS).parts}
            item.add_marker(pytest.mark.xdist_group("first" if first else "second"))


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
