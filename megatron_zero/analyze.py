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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_zero.advantages import group_advantages
from megatron_zero.analysis.bias import OBJECTIVES, weight_shares
from megatron_zero.analysis.responses import QUESTIONS, judge_messages, marks, verdict
from megatron_zero.analysis.rollout_stats import length_bucket
from megatron_zero.config import RunConfig
from megatron_zero.config_io import load_config
from megatron_zero.observability.rollouts import read_rollouts
from megatron_zero.observability.run_dir import RunDir, write_atomically
from megatron_zero.observability.sinks import read_metrics

try:
    import pandas as pd
    from matplotlib.figure import Figure

    from megatron_zero.judge import ask_judge
except ImportError as error:
    raise ValueError(f"analyze: {error}: pip install 'megatron_zero[analysis]'") from None

Tables = dict[str, pd.DataFrame]  # by title
LOCAL_JUDGE = "http://localhost:8000/v1"  # where `vllm serve` listens
LOGGED = ("response/length_", "reward/no_signal_", "weight/difficulty_", "weight/length_")


def rollout_files(path: Path) -> list[Path]:
    """The rollout files of a run directory, by step; any other path is itself."""
    return sorted(path.glob("rollouts/step_*.jsonl.zst")) if path.is_dir() else [path]


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


def analyze_responses(args: argparse.Namespace) -> tuple[Tables, dict[str, Any]]:
    """`self-reflection` and `answering`: counts by file, and what is found in every response."""
    files = [file for path in args.paths for file in rollout_files(path)]
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


def weigh_step(path: Path, config: RunConfig) -> pd.DataFrame:
    """One row per response of a rollout file, with its shares of the step's responses and tokens,
    and of the weight under each objective and under the run's own; nan where there is no weight.
    """
    columns = ["question", "reward", "correct", "truncated", "length", "advantage"]
    rows = pd.DataFrame(read_responses(path), columns=columns)
    trained = ~rows.truncated | (not config.loss.mask_truncated)
    rewards, lengths, advantages = (
        torch.tensor(column).view(rows.question.nunique(), -1)
        for column in (rows.reward, rows.length, rows.advantage * trained)
    )
    rows["run"] = weight_shares(advantages, lengths, config.loss.length_normalizer).view(-1).numpy()
    for name, (std, normalizer) in OBJECTIVES.items():
        counterfactual = group_advantages(rewards, normalize_std=std)
        rows[name] = weight_shares(counterfactual, lengths, normalizer).view(-1).numpy()
    limit = config.rollout.max_response_tokens
    return rows.assign(
        step=int(path.name.removeprefix("step_").split(".")[0]),
        success_rate=(rows.reward > 0).groupby(rows.question).transform("mean"),
        quarter=[length_bucket(length, limit) for length in rows.length],
        responses=1 / len(rows),
        tokens=rows.length / rows.length.sum(),
    )


def analyze_bias(args: argparse.Namespace) -> tuple[Tables, dict[str, Any]]:
    """`bias`: lengths, correlation and weights of what a run recorded, and its logged metrics.

    A weight of 1 is that of the step's mean question, or token. Rewards are the verifier's: an
    overlong penalty is seen in the run's own weights alone.
    """
    run_dir = RunDir(args.paths[0])
    config, files = load_config(run_dir.config), rollout_files(run_dir.path)
    if not isinstance(config, RunConfig) or not files:
        raise ValueError(f"{run_dir.path}: not a training run that has rollouts")
    rows = pd.concat([weigh_step(path, config) for path in files])
    names = ["run", *OBJECTIVES]
    weighed = rows.dropna(subset=names)

    def weights(of: pd.DataFrame, by: Any, unit: str) -> pd.DataFrame:
        sums = of.groupby(by)[[*names, unit]].sum()
        return sums[names].div(sums[unit], axis=0)

    kinds = {"correct": rows.correct, "wrong": ~rows.correct, "truncated": rows.truncated}
    lengths = {kind: rows[chosen].groupby("step").length.mean() for kind, chosen in kinds.items()}
    after = {"only_std": "by std", "only_length": "by length", "grpo": "by both"}
    moved = weighed[[*after]].sub(weighed.dr_grpo, axis=0).abs().groupby(weighed.step).sum() / 2
    correlation = rows.groupby("step")[["advantage", "length"]].corr().advantage.unstack().length
    logged = pd.DataFrame(read_metrics(run_dir.metrics)).set_index("step")
    tables = {
        "mean length": pd.DataFrame(lengths),
        "correlation of advantage and length": correlation.to_frame("r"),
        "weight of a question": weights(weighed, "success_rate", "responses"),
        "weight moved by normalisation": moved.rename(columns=after),
        "weight of a token, correct": weights(weighed[weighed.correct], "quarter", "tokens"),
        "weight of a token, wrong": weights(weighed[~weighed.correct], "quarter", "tokens"),
        **{f"logged {group}": logged.filter(like=group).dropna(how="all") for group in LOGGED},
    }
    questions = weights(weighed, ["step", "question", "success_rate"], "responses")
    correlation = rows[["advantage", "length"]].corr()
    return tables, {"correlation": plain(correlation), "questions": plain(questions)}


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For JSON: a dictionary per row, its index included; nan becomes null."""
    return json.loads(table.reset_index().to_json(orient="records", double_precision=15))


def write_report(tables: Tables, details: Mapping[str, Any], path: Path) -> None:
    """`path` with .json: everything; with .png: each table as lines; and the tables, printed."""
    shown = {title: table for title, table in tables.items() if not table.empty}
    data = {"tables": {title: plain(table) for title, table in shown.items()}, **details}
    write_atomically(path.with_suffix(".json"), json.dumps(data, indent=1).encode())
    num_rows = -(-len(shown) // 2)
    figure = Figure(figsize=(14, 4 * num_rows), layout="constrained")
    for number, (title, table) in enumerate(shown.items(), start=1):
        print(f"{title}\n{table.to_string(float_format='{:.3g}'.format, max_rows=12)}\n")
        axes = figure.add_subplot(num_rows, 2, number)
        table.plot(ax=axes, marker="o", title=title)
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
    analyze = analyze_responses
    if args.analysis == "bias":
        if args.judge or len(args.paths) > 1:
            raise ValueError("analyze bias: takes one run directory, and no judge")
        analyze = analyze_bias
    elif args.analysis == "answering":
        args.judge = args.judge or LOCAL_JUDGE
    write_report(*analyze(args), args.out / args.analysis)
    return 0
