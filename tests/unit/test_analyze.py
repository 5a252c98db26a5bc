"""`megatron-zero analyze` on files made here: every number of its reports by hand.

The run has three steps of two questions, each with four responses; the longest may have 40 tokens.
Step 1 is the one of `analysis/test_gradient_weights.py`: of Dr. GRPO's weight question 0 has 25 of
55, of GRPO's 3 of 3 + 2 sqrt(3). Step 2 has no signal. Step 3 repeats step 1.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from megatron_zero import analyze, analyze_tables, cli
from megatron_zero.advantages import group_advantages
from megatron_zero.config import LossConfig, ModelConfig, PretrainConfig, RolloutConfig, RunConfig
from megatron_zero.observability.rollouts import write_rollouts
from megatron_zero.observability.run_dir import RunDir, create_run_dir
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup

REWARDS = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
LENGTHS = torch.tensor([[10, 10, 20, 40], [10, 20, 10, 20]])
TEXTS = ["2+2=4.", "Wait, recheck: 5.", "5", "Hmm... "]


def write_step(run_dir: RunDir, step: int, rewards: torch.Tensor) -> None:
    groups, graded = [], []
    for p, row in enumerate(rewards.tolist()):
        responses = [
            Response(
                token_ids=(7,) * length,
                rollout_logprobs=(-1.0,) * length,
                text=text,
                truncated=length == 40,
                policy_version=step - 1,
            )
            for length, text in zip(LENGTHS[p].tolist(), TEXTS, strict=True)
        ]
        prompt = Prompt(index=p, text=f"question {p}", token_ids=(1, 2), answers=("4",))
        groups.append(RolloutGroup(prompt=prompt, responses=tuple(responses)))
        graded.append(
            [Graded(reward=r, correct=r > 0, formatted=True, outcome="correct") for r in row]
        )
    advantages = group_advantages(rewards, normalize_std=False)
    write_rollouts(run_dir.rollouts(step), groups, graded, advantages.tolist())


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run of Dr. GRPO that skipped truncated responses."""
    config = RunConfig(
        name="run",
        runs_dir=str(tmp_path),
        model=ModelConfig(path="unused"),
        rollout=RolloutConfig(num_prompts_per_step=128, max_response_tokens=40),
        loss=LossConfig(mask_truncated=True),
    )
    run_dir = create_run_dir(config, resume=False)
    for step, rewards in ((1, REWARDS), (2, 0 * REWARDS), (10, REWARDS)):
        write_step(run_dir, step, rewards)
    logged = {"weight/difficulty_hard": 0.25, "weight/length_q1": 0.5, "policy/loss": 1.0}
    lines = [{"step": 0, "eval/a/accuracy": 0.1}, {"step": 1, **logged}, {"step": 2}]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def report(tmp_path: Path, *words: "str | Path") -> dict:
    """What a command wrote as JSON, its figure checked."""
    out = tmp_path / "out"
    assert cli.main(["analyze", *map(str, words), "--out", str(out)]) == 0
    assert (out / f"{words[0]}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{words[0]}.json").read_text())


def by(rows: list[dict], key: str) -> dict:
    """The table's rows by their first column."""
    return {row.pop(key): row for row in rows}


def test_bias_of_a_run_by_hand(run_dir: RunDir, tmp_path: Path, capsys) -> None:
    result = report(tmp_path, "bias", run_dir.path)
    tables = result["tables"]
    lengths = by(tables["mean length"], "step")
    assert list(lengths) == [1, 2, 10]
    assert lengths[1] == {"correct": 40 / 3, "wrong": 20, "truncated": 40}
    assert lengths[2] == {"correct": None, "wrong": 17.5, "truncated": 40}
    # sum A (n - 17.5) = -10, sum A^2 = 1.75, sum (n - 17.5)^2 = 750
    correlation = by(tables["correlation of advantage and length"], "step")
    assert correlation[1]["r"] == pytest.approx(-10 / math.sqrt(1.75 * 750))
    assert correlation[2]["r"] is None
    (of_all,) = [r["length"] for r in result["correlation"] if r["index"] == "advantage"]
    assert of_all == pytest.approx(-20 / math.sqrt(3.5 * 3 * 750))

    root = math.sqrt(3)  # of 12 / 4: 0.5 / sqrt(1/3) = 0.5 * root
    questions = by(tables["weight of a question"], "success_rate")
    assert list(questions) == [0.25, 0.5]
    expected = {
        "run": (15 / 45, 30 / 45),  # without the truncated one
        "dr_grpo": (25 / 55, 30 / 55),
        "only_std": (50 / (50 + 30 * root), 30 * root / (50 + 30 * root)),
        "only_length": (1.5 / 3.5, 2 / 3.5),
        "grpo": (3 / (3 + 2 * root), 2 * root / (3 + 2 * root)),
    }
    for name, (first, second) in expected.items():  # each is half of the questions
        assert questions[0.25][name] == pytest.approx(2 * first), name
        assert questions[0.5][name] == pytest.approx(2 * second), name

    wrong = by(tables["weight of a token, wrong"], "quarter")
    assert list(wrong) == ["q1", "q2", "q4"]  # 20, 40 and 40 of 140 tokens
    dr_grpo = {"q1": (2.5 + 5) / 55 * 7, "q2": (5 + 10) / 55 * 3.5, "q4": 10 / 55 * 3.5}
    only_length = {"q1": 0.75 / 3.5 * 7, "q2": 0.75 / 3.5 * 3.5, "q4": 0.25 / 3.5 * 3.5}
    for quarter, row in wrong.items():
        assert row["dr_grpo"] == pytest.approx(dr_grpo[quarter])
        assert row["only_length"] == pytest.approx(only_length[quarter])
    assert wrong["q4"]["run"] == 0
    correct = by(tables["weight of a token, correct"], "quarter")
    assert correct["q2"]["dr_grpo"] == pytest.approx(10 / 55 * 7)

    moved = by(tables["weight moved by normalisation"], "step")
    assert list(moved) == [1, 10]
    assert moved[1]["by length"] == pytest.approx(16 / 77)
    # the std multiplies question 0 by 2 and question 1 by root: all of a question moves alike
    assert moved[1]["by std"] == pytest.approx(50 / (50 + 30 * root) - 25 / 55)

    assert [row["step"] for row in result["questions"]] == [1, 1, 10, 10]
    assert result["questions"][2]["grpo"] == pytest.approx(2 * expected["grpo"][0])
    logged = [{"step": 1, "weight/difficulty_hard": 0.25}]
    assert tables["logged weight by difficulty"] == logged
    assert "logged groups without signal" not in tables  # an older run's
    output = capsys.readouterr().out
    assert "weight of a question (1 = the mean question)" in output
    assert output.index("reading the rollouts of 3 steps") < output.index("drawing the figure")


def test_self_reflection_by_response_and_question(run_dir: RunDir, tmp_path: Path) -> None:
    """Every question has the four texts; the second says two things, and two of four say one."""
    file = run_dir.rollouts(1)
    evaluation = tmp_path / "responses.jsonl"
    lines = [
        {"benchmark": b, "index": 0, "prompt": "p", "output": text, "correct": text == "5\u2028"}
        for b, text in [("a", "5\u2028"), ("a", "Hmm."), ("b", "Wait! hmm"), ("b", "double-check")]
    ]
    evaluation.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    result = report(tmp_path, "self-reflection", file, evaluation)
    tables = {name: by(rows, "file") for name, rows in result["tables"].items()}
    names = ("all", "exclaim", "check again", "start over", "any keyword")

    def row(table: str, path: Path) -> list:
        return [tables[table][str(path)][name] for name in names]

    assert row("responses", file) == [8, 4, 2, 0, 4]
    assert row("questions", file) == [2, 2, 2, 0, 2]
    # correct: of question 0 the first, of question 1 the first and the second
    assert row("accuracy", file) == [3 / 8, 1 / 4, 1 / 2, None, 1 / 4]
    assert row("responses", evaluation) == [4, 2, 1, 0, 3]
    assert row("questions", evaluation) == [2, 2, 1, 0, 2]
    found = [r["found"]["exclaim"] for r in result["responses"] if r["file"] == str(evaluation)]
    assert found == [0, 1, 2, 0]  # how often, in each response
    assert "reflects" not in result["responses"][0]["found"]  # no judge was asked
    of_run = report(tmp_path, "self-reflection", run_dir.path)
    assert [r["all"] for r in of_run["tables"]["responses"]] == [8, 8, 8]
    again = report(tmp_path, "self-reflection", run_dir.path, file)  # that file is in the folder
    assert again == of_run


def test_a_judge_sees_every_response(run_dir: RunDir, tmp_path: Path, monkeypatch) -> None:
    asked: list = []

    def ask_judge(requests, path, **options):
        asked.append((path, options))
        known = {"2+2=4.": "ANSWERS", "5": "CONTINUES\nyes", "Hmm... ": None}
        texts = [r[-1]["content"].split("<OUTPUT>\n")[1].split("\n</OUT")[0] for r in requests]
        return [known.get(text, "what?") for text in texts]

    monkeypatch.setattr(analyze_tables, "ask_judge", ask_judge)
    result = report(tmp_path, "answering", run_dir.rollouts(1))
    (row,) = result["tables"]["responses"]
    labels = ("all", "answers", "continues", "neither", "unclear", "refused")
    assert [row[label] for label in labels] == [8, 2, 2, 0, 2, 2]
    assert result["tables"]["accuracy"][0]["answers"] == 1
    path, options = asked[0]
    assert path == tmp_path / "out" / "answering.replies.jsonl"
    assert options == {"url": analyze.LOCAL_JUDGE, "model": "", "concurrency": 16}
    assert result["responses"][2]["reply"] == "CONTINUES\nyes"
    assert result["asked"]["answering"]["labels"] == ["answers", "continues", "neither"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bias", "{tmp}/none"], "config.yaml: cannot be read"),
        (["bias", "{tmp}/pretrained"], "not a training run that has rollouts"),
        (["bias", "{run}", "{run}"], "takes one run directory"),
        (["bias", "{run}", "--judge", "http://x"], "unrecognized arguments: --judge http://x"),
        (["bais", "{run}"], "'bais' (choose from"),
        ([], "arguments are required: ANALYSIS; see megatron-zero analyze --help"),
        (["answering"], "arguments are required: FILE; see megatron-zero analyze answering --help"),
        (["self-reflection", "{tmp}/none.jsonl"], "none.jsonl: no rollouts, nor responses"),
        (["self-reflection", "{run}/metrics.jsonl"], "metrics.jsonl: no rollouts, nor responses"),
        (["self-reflection", "{tmp}/empty"], "no responses in"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(
    run_dir: RunDir, tmp_path: Path, capsys, words: "list[str]", message: str
) -> None:
    pretrained = PretrainConfig(
        name="pretrained", runs_dir=str(tmp_path), model=ModelConfig(path="x")
    )
    create_run_dir(pretrained, resume=False)
    (tmp_path / "empty").mkdir()
    words = [word.format(tmp=tmp_path, run=run_dir.path) for word in words]
    with pytest.raises(SystemExit) as status:
        cli.main(["analyze", *words, *(["--out", str(tmp_path / "out")] if words else [])])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "megatron_zero.analyze_figure", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["analyze", "bias", "x"])
    assert "matplotlib.figure" in (error := capsys.readouterr().err)
    assert "pip install 'megatron_zero[analysis]'" in error


def test_greedy_and_sampled_responses_are_counted_apart(tmp_path: Path, capsys) -> None:
    """Of one file, as `megatron-zero eval` writes them: 1 of 2 correct greedy, 1 of 4 sampled."""
    evaluation = tmp_path / "responses.jsonl"
    rows = [(0.0, "Wait.", True), (0.0, "5", False)]
    rows += [(1.0, "Wait.", False), (0.6, "Hmm.", False), (1.0, "5", True), (1.0, "5", False)]
    lines = [
        {"benchmark": "a", "index": i % 2, "prompt": "p"}
        | {"temperature": temperature, "output": output, "correct": correct}
        for i, (temperature, output, correct) in enumerate(rows)
    ]
    evaluation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = report(tmp_path, "self-reflection", evaluation)["tables"]
    names = ("file", "sampling", "all", "exclaim")
    assert [[row[name] for name in names] for row in tables["responses"]] == [
        [str(evaluation), "greedy", 2, 1],
        [str(evaluation), "sampled", 4, 2],
    ]
    assert [row["all"] for row in tables["accuracy"]] == [1 / 2, 1 / 4]
    assert [row["exclaim"] for row in tables["accuracy"]] == [1, 0]
    assert [row["exclaim"] for row in tables["questions"]] == [1, 2]
    assert "responses greedy" in capsys.readouterr().out


@pytest.mark.parametrize("name", analyze.SUMMARIES)
def test_the_help_of_an_analysis_has_examples_that_parse(name, capsys) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(["analyze", name, "--help"])
    assert status.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    start = f"  megatron-zero analyze {name} "
    examples = [line.split() for line in lines if line.startswith(start)]
    assert len(examples) >= 2
    for _, command, *words in examples:
        args = analyze.make_parser().parse_args(words)
        assert command == "analyze" and args.analysis == name and args.paths
    assert ("--judge URL" in "\n".join(lines)) == (name != "bias")


def test_the_help_needs_no_heavy_package(capsys) -> None:
    script = "import sys\nimport megatron_zero.analyze as a\na.make_parser().format_help()\n"
    script += "print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert not set(loaded.stdout.split()) & {"torch", "pandas", "matplotlib", "openai", "numpy"}
