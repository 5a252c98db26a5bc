"""Every command of README.md, docs/ and the docstrings is one that the project takes.

Commands are read from the code blocks and the inline code. What is cheap is run as written; of what
trains, converts or asks a judge the arguments go through the program's own parser, and settings,
recipes and layouts through its checks. A program that is not ours is only looked up.
"""

import argparse
import ast
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_zero import cli, evaluate, launch_args
from megatron_zero import eval as eval_command
from megatron_zero.config_io import known_recipes, save_config
from megatron_zero.hf_config import read_hf_config
from megatron_zero.layout import check_layout
from megatron_zero.rewards.equivalence import is_equivalent
from recipes.hardware import MODELS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(
    path
    for folder in ("megatron_zero", "recipes", "tools", "launchers")
    for path in (ROOT / folder).rglob("*.py")
)
_VARIABLES = re.compile(r"([A-Z_]+=\S+ )*")
# what stands for something else in the pages, in the order in which it is put in
PLACEHOLDERS = [
    (r"<recipe\|file\.yaml>|<recipe>|<recipe\|experiment>", "quickstart"),
    (r"<this file>", "runs/quickstart/config.yaml"),
    (r"<another name>", "another"),
    (r"<hf dir or id>", "Qwen/Qwen2.5-Math-7B"),
    (r"<torchrun's options>", ""),
    (r"<command>", "train"),
    (r"<what>", "bias"),
    (r"\[key=value \.\.\.\]|\[options\]", ""),
    (r"FILES(\.\.\.|…)", "a.jsonl b.jsonl"),
    (r"\bRUN_DIR\b|\bruns/NAME\b", "runs/quickstart"),
    (r"(?<=size )N\b", "2"),
    (r"(\w+)((?:\\?\|[\w-]+)+)(?=[\s\]]|$)", r"\1"),  # one of several words
    (r"(?<![\w.])\[|\](?=\s|$)", ""),  # what may be left out is there
]


@dataclass(frozen=True)
class Command:
    """A command with where it stands, its environment variables and words."""

    place: str
    text: str

    @property
    def words(self) -> "list[str]":
        text = self.text
        for pattern, value in PLACEHOLDERS:
            text = re.sub(pattern, value, text)
        return shlex.split(text[_VARIABLES.match(text).end() :])


def code_of_page(text: str) -> "list[str]":
    """Lines of code blocks that are no Python, continued ones joined, and inline code."""
    found = []
    for fence in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        if fence[1] != "python":
            found += re.sub(r" *\\?\n +", " ", fence[2]).splitlines()
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return found + [span[1] for span in re.finditer(r"`([^`\n]+)`", rest)]


def code_of_module(text: str) -> "list[str]":
    """Lines of the module's docstring, and inline code in it."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    spans = [span[1] for span in re.finditer(r"`([^`\n]+)`", docstring)]
    lines = [line.strip() for line in re.sub(r" *\\\n +", " ", docstring).splitlines()]
    return [line for line in lines if not line.startswith("make ")] + spans  # "make" is a word


def commands() -> "list[Command]":
    found = []
    for path in [*PAGES, *SOURCES]:
        code = code_of_page if path.suffix == ".md" else code_of_module
        for line in code(path.read_text()):
            without_comment = re.split(r"\s#\s", line)[0]
            for part in without_comment.split(" && "):
                text = part.strip().removeprefix(".venv/bin/").partition(" …")[0]
                program = _VARIABLES.sub("", text, count=1).split(" ")[0]
                # alone, or with words: "vllm" in a sentence is no command
                if program in CHECKS and (" " in text or program == "pytest"):
                    found.append(Command(path.relative_to(ROOT).as_posix(), text))
    return found


class Parsed(Exception):
    """A parser took all arguments; nothing was done with them."""


@pytest.fixture
def parse_only(monkeypatch) -> None:
    """Parsers take or refuse their arguments, and nothing happens after that."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self, args=None, namespace=None, parse=parse):
            raise Parsed(parse(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs and models that the pages speak of, as far as their configurations."""
    folder = tmp_path_factory.mktemp("documented")
    for name, recipe in known_recipes().items():
        run = folder / "runs" / name
        run.mkdir(parents=True)
        save_config(recipe(), run / "config.yaml")
    sizes = read_hf_config(known_recipes()["quickstart_base"]().model) | {"vocab_size": 128}
    for model in ("quickstart_base/hf/step_000500", "quickstart/hf/step_000080"):
        (folder / "runs" / model).mkdir(parents=True)
        (folder / "runs" / model / "config.json").write_text(json.dumps(sizes))
    return folder


def check_megatron_zero(words: "list[str]", request: pytest.FixtureRequest) -> None:
    if not words or words[0].startswith("-"):
        assert cli.main(words) in (0, 2)
        return
    verb, *rest = words
    assert verb in cli.VERBS, f"no such command: {verb}"
    if verb in launch_args.COMMANDS:
        if "--help" not in rest:
            check_training(verb, rest)
    elif verb == "doctor":
        assert rest == []
    elif verb == "eval":
        check_eval(rest)
    elif "--help" in rest:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
    elif rest:  # analyze
        request.getfixturevalue("parse_only")
        files = [] if rest[1:] else ["runs/quickstart"]
        with pytest.raises(Parsed):
            cli.main([*words, *files])


def check_training(verb: str, words: "list[str]") -> None:
    if not words:  # the name of the command
        return
    args = launch_args.parse_args(verb, words, launcher=True)
    if args.nproc is not None:
        model = args.config.model
        sizes = MODELS.get(model.path) or read_hf_config(model)
        check_layout(args.config, sizes, args.nproc)


def check_eval(words: "list[str]") -> None:
    if words[:1] != ["--compare"]:
        if len(words) > 1:
            eval_command.parse_args(words)
        return
    made = {"benchmark": "b", "index": 0, "temperature": 0.0, "sample": 0, "answer_class": 0}
    made |= {"num_tokens": 10, "truncated": False, "formatted": True, "correct": True}
    for path in map(Path, words[1:]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(evaluate.results_json(evaluate.summarize([made]), {}))
    assert cli.main(["eval", *words]) == 0


def check_python(words: "list[str]", request: pytest.FixtureRequest) -> None:
    if words[0].endswith(".py"):
        script = ROOT / words[0]
        if not script.exists():
            script = next(path for path in SOURCES if path.name == words[0])
        request.getfixturevalue("parse_only")
        request.getfixturevalue("monkeypatch").setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
        return
    assert words[0] == "-m"
    module, arguments = words[1], words[2:]
    if module == "recipes.launch":
        check_launch(arguments, request)
    elif module in ("megatron_zero.train", "megatron_zero.pretrain"):
        check_training(module.rpartition(".")[2], arguments)
    else:  # somebody else's, or a part of ours that is not called by hand
        assert module.startswith(("vllm.", "torch.", "megatron_zero.")), module


def check_launch(words: "list[str]", request: pytest.FixtureRequest) -> None:
    """Written, and not submitted."""
    launch = pytest.importorskip("recipes.launch")
    from nemo_run import config

    monkeypatch, out = (request.getfixturevalue(name) for name in ("monkeypatch", "tmp_path"))
    monkeypatch.setattr(config, "_NEMORUN_HOME", str(out / "nemo_run"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # its shell commands look at it
    words = [word for word in words if word != "--dryrun"]
    if len(words) > 1:
        assert launch.main([*words, "--dryrun", "--output", str(out / "launched")]) == 0
        assert list((out / "launched").rglob("*")), "nothing was written"


def check_launcher(script: str) -> "Callable[[list[str], pytest.FixtureRequest], None]":
    def check(words: "list[str]", request: pytest.FixtureRequest) -> None:
        assert os.access(ROOT / script, os.X_OK) and (ROOT / script).is_file()
        if words:
            launch_args.parse_args("train", words)

    return check


def check_sbatch(words: "list[str]", request: pytest.FixtureRequest) -> None:
    place = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[place]).is_file()
    launch_args.parse_args("train", words[place + 1 :])


def check_make(words: "list[str]", request: pytest.FixtureRequest) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets, f"no such target: {words[0]}"


def check_pip(words: "list[str]", request: pytest.FixtureRequest) -> None:
    assert words[0] == "install"
    extras = re.search(r"\[(.*)\]$", " ".join(words).replace(" ", ","))
    known = re.findall(r'^ +"([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert known, "setup.py lists its extras in another way"
    for extra in extras[1].split(",") if extras else []:
        assert extra in known, f"no such extra: {extra}"


def check_pytest(words: "list[str]", request: pytest.FixtureRequest) -> None:
    for word in words:
        if word.startswith("--"):
            request.config.getoption(word)
        else:
            assert (ROOT / word).exists(), word


def check_nemo(words: "list[str]", request: pytest.FixtureRequest) -> None:
    """Their running is in test_launchers; here the recipe and its settings."""
    namespace, verb, first, *rest = words
    assert namespace == "megatron_zero" and first.startswith("config=")
    settings = [word.removeprefix("config.") for word in rest if "=" in word]
    launch_args.parse_args(verb, [first.removeprefix("config="), *settings])


def check_nothing(words: "list[str]", request: pytest.FixtureRequest) -> None:
    """vllm and the shell."""


CHECKS: "dict[str, Callable[[list[str], pytest.FixtureRequest], None]]" = {
    "megatron-zero": check_megatron_zero,
    "python": check_python,
    "launchers/one_node.sh": check_launcher("launchers/one_node.sh"),
    "launchers/many_nodes.sh": check_launcher("launchers/many_nodes.sh"),
    "sbatch": check_sbatch,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "nemo": check_nemo,
    "vllm": check_nothing,
    "source": check_nothing,
}
COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.place}: {c.text}"[:90])
def test_a_command_is_taken(command: Command, folder: Path, request, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    program, *words = command.words
    CHECKS[program](words, request)


def test_every_kind_of_command_is_found():
    """One that is not would not be checked."""
    assert {command.words[0] for command in COMMANDS} == set(CHECKS)
    by_page = {command.place for command in COMMANDS}
    assert by_page >= {"README.md", "docs/evaluation.md", "docs/launching.md", "docs/converting.md"}


@pytest.mark.parametrize(
    "text",
    [
        "megatron-zero trian quickstart",
        "megatron-zero train quickstrt",
        "megatron-zero train <recipe> rollout.group_sise=4",
        "megatron-zero train qwen2_5_math_7b --nproc 3",
        "megatron-zero eval model --benchmark aime --out x",
        "megatron-zero analyze bais runs/quickstart",
        "python tools/convert/hf_to_megatron.py HF_DIR",
        "python -m recipes.launch ablation --executor slurm --account lab",
        "launchers/one_node.sh quickstrt",
        "make quikstart",
        "pip install '.[cuda,lunch]'",
        "pytest tests/invariance/test_gradient_layout.py",
        "nemo megatron_zero train config=quickstrt",
    ],
)
def test_a_wrong_command_would_be_found(text, folder, request, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    program, *words = Command("here", text).words
    with pytest.raises((ValueError, AssertionError, SystemExit, pytest.fail.Exception)):
        CHECKS[program](words, request)


def test_what_the_quickstart_says_is_next(folder: Path, request, monkeypatch) -> None:
    """The commands at its end, in the Makefile's words, with the paths that it was given."""
    make = ["make", "-s", "-C", str(ROOT), "what-next", "RUN=runs/quickstart_0102_030405"]
    said = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(folder)
    (folder / "runs" / "quickstart_0102_030405").symlink_to("quickstart")
    lines = re.findall(r"^  \.venv/bin/(.*)$", said, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["eval", "eval", "eval", "analyze"]
    for line in lines:
        program, *words = Command("Makefile", line).words
        CHECKS[program](words, request)
    base, trained, comparison, _ = (shlex.split(line) for line in lines)
    assert base[-1] == "runs/quickstart_base/sampled"
    assert trained[-1] == "runs/quickstart_0102_030405/sampled"
    assert comparison[-2:] == [f"{out[-1]}/arithmetic.json" for out in (base, trained)]
    assert base[3:-2] == trained[3:-2]  # the same question to both


def python_blocks() -> "list[tuple[str, str]]":
    found = []
    for page in PAGES:
        blocks = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.M | re.S)
        found += [(page.name, textwrap.dedent(block)) for block in blocks]
    return found


@pytest.mark.parametrize(("page", "block"), python_blocks(), ids=lambda text: text[:20])
def test_python_in_the_pages_is_python(page, block):
    """And where a line says what it comes to, it does."""
    compile(block, page, "exec")
    for line in block.splitlines():
        if claim := re.match(r"(is_equivalent\(.*\))  # (True|False)\b", line):
            assert eval(claim[1], {"is_equivalent": is_equivalent}) is (claim[2] == "True")


def test_the_launch_time_of_the_pages_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks" / "results" / "launch_time.json").read_text())
    seconds = results["median_s"]
    imports = seconds["import torch"] + seconds["import Megatron-Core, transformers"]
    said = " ".join((ROOT / "docs" / "launching.md").read_text().split())
    assert f"{seconds['total']:.1f} s to the end of the first step" in said
    assert f"{imports:.1f} s importing torch" in said
    assert f"{seconds['start vLLM']:.1f} s starting vLLM" in said
    assert f"without a line was {results['longest_silence_s']:.1f} s" in said
