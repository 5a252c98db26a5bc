"""The architecture's rules on imports and sizes, read from the source text of every module.

Heavy packages are imported where they belong and nowhere else, imports go strictly downward, and a
laptop that only launches runs loads no torch. Each checker is also run on a made-up module that
breaks the rule, so that a checker which finds nothing is known to be able to find something.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Rows of the architecture, lowest first: a unit may import those of lower rows. A unit is a module
# or package right under megatron_zero; whatever is not named here is composition, the top row.
VOCABULARY = ["types", "config", "config_io", "strict_yaml", "hf_config", "objective"]
VOCABULARY += ["determinism", "checks", "layout", "config_data", "config_objective"]
VOCABULARY += ["failures", "step_names"]
PURE = ["rewards", "advantages", "batching", "losses", "convert", "analysis", "plan"]
PURE += ["rollout_rounds"]
HEAVY = ["rollout", "policy", "weight_sync", "data", "observability", "report"]
# Within these rows units do not import one another, but for the exceptions.
CLOSED_ROWS = [PURE, HEAVY]
EXCEPTIONS = {("weight_sync", "megatron_zero.rollout.engine")}

# Who may import a heavy package: a prefix of paths, or several.
OWNERS: dict[str, str | tuple[str, ...]] = {
    "nemo_run": "recipes/launch.py",
    "vllm": ("megatron_zero/rollout/vllm_engine.py", "megatron_zero/rollout/upstream.py"),
    "megatron.core": "megatron_zero/policy/",
    "transformer_engine": "megatron_zero/policy/",
}
# Of the package recipes, what starts runs: it may need what the command line needs.
LAUNCHING = {"jobs", "manifests"}
PARALLEL_STATE_OWNER = "megatron_zero/policy/parallel.py"

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
LOOPS = {("megatron_zero/train.py", "train"), ("megatron_zero/train_async.py", "train_async")}


def project_sources() -> dict[str, str]:
    """Path relative to the root -> text, of everything that is not a test."""
    sources = {}
    for top in ("megatron_zero", "recipes", "tools", "launchers"):
        for folder, subfolders, names in os.walk(ROOT / top):
            # Not into .venv or the like: other people's code.
            subfolders[:] = [name for name in sorted(subfolders) if not name.startswith(".")]
            for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
                sources[path.relative_to(ROOT).as_posix()] = path.read_text()
    return sources


def imported_names(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a module.

    `from a.b import c` gives `a.b.c`: whether c is a module makes no difference to the rules.
    """
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def row_of(unit: str) -> int:
    rows = [VOCABULARY, PURE, HEAVY]
    return next((i for i, row in enumerate(rows) if unit in row), len(rows))


def upward_imports(sources: dict[str, str]) -> list[str]:
    """Imports within megatron_zero that go up a row, or sideways in a closed one."""
    found = []
    for path, source in sources.items():
        if not path.startswith("megatron_zero/"):
            continue
        importer = path.split("/")[1].removesuffix(".py")
        for line, name in imported_names(path, source):
            parts = name.split(".")
            if parts[0] != "megatron_zero" or len(parts) < 2 or importer == "__init__":
                continue
            imported = parts[1]
            up = row_of(imported) > row_of(importer)
            beside = imported != importer and any(
                importer in row and imported in row for row in CLOSED_ROWS
            )
            excepted = (importer, ".".join(parts[:3])) in EXCEPTIONS
            if up or (beside and not excepted):
                found.append(f"{path}:{line}: {importer} must not import {imported}")
    return found


def misplaced_packages(sources: dict[str, str]) -> list[str]:
    """Imports of heavy packages outside the file or folder that owns them."""
    found = []
    for path, source in sources.items():
        for line, name in imported_names(path, source):
            for package, owner in OWNERS.items():
                if f"{name}.".startswith(f"{package}.") and not path.startswith(owner):
                    found.append(f"{path}:{line}: {package} is imported in {owner} only")
        if path == PARALLEL_STATE_OWNER:
            continue
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
            if name and "parallel_state" in str(name).split("."):
                found.append(f"{path}: parallel_state is read in {PARALLEL_STATE_OWNER} only")
    return found


def oversized(sources: dict[str, str]) -> list[str]:
    """Files and functions that have grown too long to read."""
    found = []
    lengths = {path: len(source.splitlines()) for path, source in sources.items()}
    for path, source in sources.items():
        if lengths[path] > MAX_FILE_LINES:
            found.append(f"{path}: {lengths[path]} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES and (path, node.name) not in LOOPS:
                found.append(f"{path}: {node.name}: {length} lines, more than {MAX_FUNCTION_LINES}")
    return found


@pytest.mark.parametrize("check", [upward_imports, misplaced_packages, oversized])
def test_the_project_keeps_the_rule(check):
    assert check(project_sources()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_zero/losses.py", "from megatron_zero.policy.policy import Policy"),
        ("megatron_zero/losses.py", "from megatron_zero import train"),
        ("megatron_zero/config.py", "import megatron_zero.batching"),
        ("megatron_zero/policy/model.py", "def f():\n    from megatron_zero.rollout import engine"),
        ("megatron_zero/policy/model.py", "from ..data.prompts import build_prompts"),
        ("megatron_zero/weight_sync/base.py", "import megatron_zero.rollout.sampler"),
        ("megatron_zero/rewards/math.py", "from megatron_zero import advantages"),
        ("megatron_zero/data/tables.py", "from megatron_zero.build import build_policy"),
    ],
)
def test_an_upward_import_is_found(path, source):
    assert len(upward_imports({path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_zero/weight_sync/base.py", "from megatron_zero.rollout.engine import Engine"),
        ("megatron_zero/policy/policy.py", "from megatron_zero.policy import forward"),
        ("megatron_zero/train.py", "from megatron_zero.evaluate import evaluate"),
        ("megatron_zero/cli.py", "import importlib\nimportlib.import_module('recipes')"),
    ],
)
def test_an_import_within_the_rules_is_not_found(path, source):
    assert upward_imports({path: source}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_zero/train.py", "def f():\n    from vllm import LLM"),
        ("megatron_zero/rollout/vllm_server.py", "import vllm.v1"),
        ("megatron_zero/batching.py", "from megatron import core"),
        ("megatron_zero/losses.py", "import importlib\nimportlib.import_module('megatron.core')"),
        ("recipes/quickstart.py", "import nemo_run as run"),
        ("megatron_zero/policy/model.py", "x = megatron_core.parallel_state.get_rank()"),
    ],
)
def test_a_misplaced_package_is_found(path, source):
    assert len(misplaced_packages({path: source})) == 1
    assert misplaced_packages({"recipes/quickstart.py": "import vllm_something"}) == []


def test_oversized_code_is_found():
    long_function = "def train():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert len(oversized({"megatron_zero/losses.py": long_function})) == 1
    assert oversized({"megatron_zero/train.py": long_function}) == []
    assert len(oversized({"tools/x.py": "\n" * (MAX_FILE_LINES + 1)})) == 1


def modules_loaded_by(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter loads for `statement`."""
    script = f"import sys; before = set(sys.modules)\n{statement}\n"
    script += "print(*sorted(set(sys.modules) - before))"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


def test_config_and_recipes_need_the_standard_library_only():
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"launch", *LAUNCHING}
    recipes = ["recipes" if name == "__init__" else f"recipes.{name}" for name in sorted(names)]
    loaded = modules_loaded_by(f"import megatron_zero.config, {', '.join(recipes)}")
    packages = {name.split(".")[0] for name in loaded}
    assert packages - set(sys.stdlib_module_names) == {"megatron_zero", "recipes"}
    # How long an import takes depends on the machine, how many modules it loads does not: about 60
    # here, numpy alone would be 150 more, torch 1,000.
    assert len(loaded) < 120


STARTING = ["megatron_zero.config_io", "megatron_zero.cli", "megatron_zero.node"]
STARTING += [f"recipes.{name}" for name in sorted(LAUNCHING)]


@pytest.mark.parametrize("module", STARTING)
def test_the_command_line_starts_without_heavy_packages(module):
    heavy = {"torch", "megatron", "vllm", "transformers", "nemo_run", "datasets"}
    loaded = modules_loaded_by(f"import {module}")
    assert {name.split(".")[0] for name in loaded} & heavy == set()


def test_a_heavy_import_would_be_seen():
    assert "xml.dom.minidom" in modules_loaded_by("import xml.dom.minidom")
