"""`megatron-zero analyze <what> …`: what responses say, and what weighs in a run's gradient.

    analyze self-reflection FILES…   phrases of self-reflection, and with --judge a model's opinion
    analyze answering FILES…         does the model answer the question, or write it on? (a judge)
    analyze bias RUN_DIR             lengths and gradient weights, from a run's rollouts

Each prints tables, draws them as a figure and keeps everything as JSON. FILES are what a run or
`megatron-zero eval` wrote: `rollouts/step_*.jsonl.zst`, records of evaluations, or a run directory
for all of its rollouts.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_zero.advantages import STD_EPS
from megatron_zero.analysis.responses import QUESTIONS, judge_messages, marks, verdict
from megatron_zero.analysis.rollout_stats import length_bucket
from megatron_zero.config import RunConfig
from megatron_zero.config_io import load_config
from megatron_zero.observability.rollouts import read_rollouts
from megatron_zero.observability.run_dir import ROLLOUT_SUFFIX, RunDir, write_atomically
from megatron_zero.observability.sinks import read_metrics
from megatron_zero.step_names import step_of, steps_in

try:
    import pandas as pd
    from matplotlib.figure import Figure

    from megatron_zero.judge import ask_judge
except ImportError as error:
    raise ValueError(f"analyze: {error}: pip install 'megatron_zero[analysis]'") from None

Report = tuple[dict[str, pd.DataFrame], dict[str, Any]]  # tables by title, and details
LOCAL_JUDGE = "http://localhost:8000/v1"  # where `vllm serve` listens
LOGGED = ("response/length_", "reward/no_signal_", "weight/difficulty_", "weight/length_")


def rollout_files(path: Path) -> list[Path]:
    """The rollout files of a run directory, by step; any other path is itself."""
    if not path.is_dir():
        return [path]
    return [RunDir(path).rollouts(step) for step in steps_in(path / "rollouts", ROLLOUT_SUFFIX)]


def read_responses(path: Path) -> list[dict[str, Any]]:
    """The responses of a rollout file, or of an evaluation's: `prompt`, `output`, `correct` …

    Raises:
        ValueError: it is neither, or is not there.
    """
    try:
        if path.suffix == ".zst":
            return [
                {"question": i, "prompt": record.group.prompt.text, "output": response.text}
                | {"length": len(response.token_ids), "truncated": response.truncated}
                | {"reward": verdict.reward, "correct": verdict.correct, "advantage": advantage}
                for i, record in enumerate(read_rollouts(path))
                for response, verdict, advantage in zip(
                    record.group.responses, record.graded, record.advantages, strict=True
                )
            ]
        lines = path.read_bytes().decode(errors="surrogatepass").split("\n")
        return [
            {name: row[name] for name in ("prompt", "output", "correct")}
            | {"question": f"{row['benchmark']} {row['index']}"}
            for row in map(json.loads, filter(None, lines))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no rollouts, nor responses of an evaluation: {error}") from None


def analyze_responses(args: argparse.Namespace) -> Report:
    """`self-reflection` and `answering`: counts by file, and what is found in every response."""
    files = [file for path in args.paths for file in rollout_files(path)]
    files = list({file.resolve(): file for file in files}.values())  # each counts once
    rows = [{"file": str(file)} | row for file in files for row in read_responses(file)]
    if not rows:
        raise ValueError(f"no responses in {', '.join(map(str, args.paths))}")
    if args.judge:
        chats = [judge_messages(args.analysis, row["prompt"], row["output"]) for row in rows]
        options = {"model": args.judge_model, "concurrency": args.concurrency}
        path = args.out / f"{args.analysis}.replies.jsonl"
        replies = ask_judge(chats, path, url=args.judge, **options)
        for row, reply in zip(rows, replies, strict=True):
            row |= {"reply": reply, "verdict": verdict(args.analysis, reply)}
    for row in rows:
        row["found"] = marks(args.analysis, row["output"], row.get("verdict", ""))
    found = pd.DataFrame([row["found"] for row in rows]) > 0
    of = pd.DataFrame(rows, columns=["file", "question", "correct"])
    tables = {
        "responses": found.groupby(of.file).sum(),
        "questions": found.groupby([of.file, of.question]).any().groupby("file").sum(),
        "accuracy": found.apply(lambda has: of[has].groupby("file").correct.mean()),
    }
    return tables, {"asked": QUESTIONS, "responses": rows}


def weigh(rows: pd.DataFrame, config: RunConfig) -> pd.DataFrame:
    """How much each response of a run weighs in its step, under several objectives.

    A response weighs sum_t |advantage * token weight|: |advantage| times its length where all
    tokens weigh the same, |advantage| alone where a token weighs 1 / length. Divided by the sum
    over the step, because what scales a whole step is taken out by the optimizer.

    Args:
        rows: `step`, `question`, `reward`, `length`, `truncated` and the run's `advantage`.

    Returns:
        A row for each, a column per objective; they sum to 1 over a step, or are nan throughout.

    Example:
        Advantages 0.5, -0.5 of 10 and 30 tokens: 0.25, 0.75; with 1 / length: 0.5, 0.5.
    """
    group = rows.groupby(["step", "question"]).reward
    centred = rows.reward - group.transform("mean")
    scaled = centred / (group.transform("std") + STD_EPS)
    per_response = config.loss.length_normalizer == "response"
    trained = ~rows.truncated | (not config.loss.mask_truncated)
    weights = {
        "run": rows.advantage * trained * (1 if per_response else rows.length),
        "dr_grpo": centred * rows.length,
        "only_std": scaled * rows.length,
        "only_length": centred * (rows.length > 0),
        "grpo": scaled * (rows.length > 0),
    }
    sizes = pd.DataFrame(weights).abs()
    return sizes / sizes.groupby(rows.step).transform("sum")


def analyze_bias(path: Path) -> Report:
    """`bias` of a run directory: lengths, correlation and weights of its rollouts, and its metrics.

    A weight of 1 is that of the step's mean question, or token. Rewards are the verifier's: an
    overlong penalty is seen in the run's own weights alone.
    """
    run_dir, files = RunDir(path), rollout_files(path)
    config = load_config(run_dir.config)
    if not isinstance(config, RunConfig) or not files:
        raise ValueError(f"{path}: not a training run that has rollouts")
    columns = ["question", "reward", "correct", "truncated", "length", "advantage"]
    frames = [
        pd.DataFrame(read_responses(file), columns=columns).assign(
            step=step_of(file.name.removesuffix(ROLLOUT_SUFFIX))
        )
        for file in files
    ]
    rows = pd.concat(frames, ignore_index=True)
    shares = weigh(rows, config)
    step, limit = rows.groupby("step"), config.rollout.max_response_tokens
    rows = rows.join(shares).assign(
        success_rate=(rows.reward > 0).groupby([rows.step, rows.question]).transform("mean"),
        quarter=[length_bucket(length, limit) for length in rows.length],
        responses=1 / step.length.transform("size"),
        tokens=rows.length / step.length.transform("sum"),
    )
    weighed = rows.dropna(subset=[*shares])

    def weights(of: pd.DataFrame, by: Any, unit: str) -> pd.DataFrame:
        sums = of.groupby(by)[[*shares, unit]].sum()
        return sums[[*shares]].div(sums[unit], axis=0)

    kinds = {"correct": rows.correct, "wrong": ~rows.correct, "truncated": rows.truncated}
    lengths = {kind: rows[chosen].groupby("step").length.mean() for kind, chosen in kinds.items()}
    after = {"only_std": "by std", "only_length": "by length", "grpo": "by both"}
    moved = weighed[[*after]].sub(weighed.dr_grpo, axis=0).abs().groupby(weighed.step).sum() / 2
    correlation = step[["advantage", "length"]].corr().advantage.unstack().length
    tables = {
        "mean length": pd.DataFrame(lengths),
        "correlation of advantage and length": correlation.to_frame("r"),
        "weight of a question": weights(weighed, "success_rate", "responses"),
        "weight moved by normalisation": moved.rename(columns=after),
        "weight of a token, correct": weights(weighed[weighed.correct], "quarter", "tokens"),
        "weight of a token, wrong": weights(weighed[~weighed.correct], "quarter", "tokens"),
    }
    logged = pd.DataFrame(read_metrics(run_dir.metrics)).set_index("step")
    tables |= {f"logged {g}": logged.filter(like=g).dropna(how="all") for g in LOGGED}
    questions = weights(weighed, ["step", "question", "success_rate"], "responses")
    correlation = rows[["advantage", "length"]].corr()
    return tables, {"correlation": plain(correlation), "questions": plain(questions)}


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For JSON: a dictionary per row, its index included; nan becomes null."""
    return json.loads(table.reset_index().to_json(orient="records", double_precision=15))


def write_report(report: Report, path: Path) -> None:
    """`path` with .json: everything; with .png: each table, drawn; and the tables, printed."""
    tables, details = report
    shown = {title: table for title, table in tables.items() if not table.empty}
    data = {"tables": {title: plain(table) for title, table in shown.items()}, **details}
    write_atomically(path.with_suffix(".json"), json.dumps(data, indent=1).encode())
    num_rows = -(-len(shown) // 2)
    figure = Figure(figsize=(14, 4 * num_rows), layout="constrained")
    for number, (title, table) in enumerate(shown.items(), start=1):
        print(f"{title}\n{table.to_string(float_format='{:.3g}'.format, max_rows=12)}\n")
        axes = figure.add_subplot(num_rows, 2, number)
        is_number = pd.api.types.is_numeric_dtype(table.index)
        style = {"marker": "o"} if is_number else {"kind": "bar", "rot": 10}
        drawn = table if is_number else table.rename(index=lambda path: Path(path).name)
        drawn.plot(ax=axes, title=title, **style)
    figure.savefig(path.with_suffix(".png"))
    print(*(path.with_suffix(suffix) for suffix in (".json", ".png")), sep="\n")


def main(argv: Sequence[str]) -> int:
    """Run one analysis.

    Raises:
        ValueError: a file is not what it should be, or the judge does not answer.
    """
    parser = argparse.ArgumentParser("megatron-zero analyze", description=__doc__)
    parser.add_argument("analysis", choices=("self-reflection", "answering", "bias"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder of the results")
    parser.add_argument("--judge", metavar="URL", help=f"answering: {LOCAL_JUDGE} if not given")
    parser.add_argument("--judge-model", default="", help="default: the one that is served")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    args = parser.parse_args(argv)
    if args.analysis == "bias" and (args.judge or len(args.paths) > 1):
        raise ValueError("analyze bias: takes one run directory, and no judge")
    if args.analysis == "answering":
        args.judge = args.judge or LOCAL_JUDGE
    is_bias = args.analysis == "bias"
    report = analyze_bias(args.paths[0]) if is_bias else analyze_responses(args)
    write_report(report, args.out / args.analysis)
    return 0
