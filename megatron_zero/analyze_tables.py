"""The tables of `megatron-zero analyze`: read from rollouts, evaluations and a run's metrics."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pandas as pd

from megatron_zero.advantages import STD_EPS
from megatron_zero.analysis.responses import QUESTIONS, judge_messages, marks, verdict
from megatron_zero.analysis.rollout_stats import length_bucket
from megatron_zero.config import RunConfig
from megatron_zero.config_io import load_config
from megatron_zero.judge import ask_judge
from megatron_zero.observability.rollouts import read_rollouts
from megatron_zero.observability.run_dir import ROLLOUT_SUFFIX, RunDir
from megatron_zero.observability.sinks import read_metrics
from megatron_zero.step_names import step_of, steps_in

SAMPLED, GREEDY = "sampled", "greedy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Titled:
    """One table and what its numbers are.

    `data` is indexed by steps, shares or names, or by `file` and `sampling`; nan is where there is
    nothing to count.
    """

    title: str
    data: pd.DataFrame
    unit: str  # of its numbers: the label of the axis
    prefix: str = ""  # of the columns' names, which a figure leaves out


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one analysis found."""

    tables: Sequence[Titled]
    details: dict[str, Any]  # for the JSON alone

    def shown(self) -> list[Titled]:
        """The tables that have a row."""
        return [table for table in self.tables if not table.data.empty]

    def as_json(self) -> dict[str, Any]:
        """Tables by title, and the details."""
        tables = {table.title: plain(table.data) for table in self.shown()}
        return {"tables": tables, **self.details}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """Whom to ask about every response."""

    url: str
    model: str = ""  # "": the one that is served
    concurrency: int = 16


LOGGED = {  # beginning of a metric's name -> title, unit
    "response/length_": ("logged response length", "tokens"),
    "reward/no_signal_": ("logged groups without signal", "share of groups"),
    "weight/difficulty_": ("logged weight by difficulty", "share of the gradient's weight"),
    "weight/length_": ("logged weight by length", "share of the gradient's weight"),
}


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
                | {"sampling": SAMPLED}
                for i, record in enumerate(read_rollouts(path))
                for response, verdict, advantage in zip(
                    record.group.responses, record.graded, record.advantages, strict=True
                )
            ]
        lines = path.read_bytes().decode(errors="surrogatepass").split("\n")
        return [
            {name: row[name] for name in ("prompt", "output", "correct")}
            | {"question": f"{row['benchmark']} {row['index']}", "sampling": _sampling(row)}
            for row in map(json.loads, filter(None, lines))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no rollouts, nor responses of an evaluation: {error}") from None


def _sampling(record: dict[str, Any]) -> str:
    """How a response of an evaluation was drawn; "" where its record does not say."""
    temperature = record.get("temperature")
    if temperature is None:
        return ""
    return SAMPLED if temperature > 0 else GREEDY


def step_of_path(path: Path) -> Optional[int]:
    """The step of a run that a file is named after, as in `step_000010.jsonl.zst`."""
    return step_of(path.name.removesuffix(".zst").removesuffix(".jsonl"))


def analyze_responses(
    analysis: str,
    paths: Sequence[Path],
    out: Path,
    *,
    judge: Optional[Judge],
    progress: Callable[[str], None],
) -> Report:
    """`self-reflection` and `answering`: counts by file, and what is found in every response.

    Greedy and sampled responses of one file are counted apart: their accuracies mean different
    things, and so do the phrases of a model that is made to say what it finds likeliest.

    Args:
        analysis: which of the two.
        paths: files of rollouts or evaluations, or run directories.
        out: folder of the judge's replies.
        progress: is told what comes next, before what may take long.

    Raises:
        ValueError: a file is not what it should be, or the judge does not answer.
    """
    files = [file for path in paths for file in rollout_files(path)]
    files = list({file.resolve(): file for file in files}.values())  # each counts once
    progress(f"reading {len(files)} file{'s' if len(files) != 1 else ''}")
    rows = [{"file": str(file)} | row for file in files for row in read_responses(file)]
    if not rows:
        raise ValueError(f"no responses in {', '.join(map(str, paths))}")
    if judge is not None:
        progress(f"asking {judge.url} about {len(rows):,} responses")
        chats = [judge_messages(analysis, row["prompt"], row["output"]) for row in rows]
        replies = ask_judge(
            chats,
            out / f"{analysis}.replies.jsonl",
            url=judge.url,
            model=judge.model,
            concurrency=judge.concurrency,
        )
        for row, reply in zip(rows, replies, strict=True):
            row |= {"reply": reply, "verdict": verdict(analysis, reply)}
    progress(f"looking through {len(rows):,} responses")
    for row in rows:
        row["found"] = marks(analysis, row["output"], row.get("verdict", ""))
    return Report(tables=_counts(rows), details={"asked": QUESTIONS, "responses": rows})


def _counts(rows: Sequence[dict[str, Any]]) -> list[Titled]:
    """How many responses and questions have each mark, by file, and how many of them are right."""
    found = pd.DataFrame([row["found"] for row in rows]) > 0
    of = pd.DataFrame(rows, columns=["file", "sampling", "question", "correct"])
    by = ["file", "sampling"]
    num_responses = found.groupby([of.file, of.sampling], sort=False).sum()  # as they were given
    questions = found.groupby([of.file, of.sampling, of.question]).any()
    accuracy = found.apply(lambda has: of[has].groupby(by).correct.mean())
    return [
        Titled(title="responses", data=num_responses, unit="number of responses"),
        Titled(
            title="questions",
            data=questions.groupby(by).sum().reindex(num_responses.index),
            unit="number of questions",
        ),
        Titled(
            title="accuracy",
            data=accuracy.reindex(num_responses.index),
            unit="share of them that is correct",
        ),
    ]


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
    # from the smallest reward on, as in `advantages`: a group of equal rewards weighs exactly 0
    question = [rows.step, rows.question]
    excess = rows.reward - rows.reward.groupby(question).transform("min")
    group = excess.groupby(question)
    centred = excess - group.transform("mean")
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


def _rows_of(files: Sequence[Path], config: RunConfig) -> pd.DataFrame:
    """Every response of a run's rollout files, with its weights and what it is grouped by."""
    columns = ["question", "reward", "correct", "truncated", "length", "advantage"]
    frames = [
        pd.DataFrame(read_responses(file), columns=columns).assign(step=step_of_path(file))
        for file in files
    ]
    rows = pd.concat(frames, ignore_index=True)
    step, limit = rows.groupby("step"), config.rollout.max_response_tokens
    return rows.join(weigh(rows, config)).assign(
        success_rate=(rows.reward > 0).groupby([rows.step, rows.question]).transform("mean"),
        quarter=[length_bucket(length, limit) for length in rows.length],
        responses=1 / step.length.transform("size"),
        tokens=rows.length / step.length.transform("sum"),
    )


OBJECTIVES = ["run", "dr_grpo", "only_std", "only_length", "grpo"]  # the columns of `weigh`


def _weights(rows: pd.DataFrame, by: "str | list[str]", unit: str) -> pd.DataFrame:
    """Sums of the objectives' weights, in units of the step's mean question or token."""
    sums = rows.groupby(by)[[*OBJECTIVES, unit]].sum()
    return sums[OBJECTIVES].div(sums[unit], axis=0)


def analyze_bias(path: Path, *, progress: Callable[[str], None]) -> Report:
    """`bias` of a run directory: lengths, correlation and weights of its rollouts, and its metrics.

    A weight of 1 is that of the step's mean question, or token. Rewards are the verifier's: an
    overlong penalty is seen in the run's own weights alone.

    Args:
        progress: is told what comes next, before what may take long.

    Raises:
        ValueError: it is no directory of a training run, or has no rollouts.
    """
    run_dir, files = RunDir(path), rollout_files(path)
    config = load_config(run_dir.config)
    if not isinstance(config, RunConfig) or not files:
        raise ValueError(f"{path}: not a training run that has rollouts")
    progress(f"reading the rollouts of {len(files)} step{'s' if len(files) != 1 else ''}")
    rows = _rows_of(files, config)
    weighed = rows.dropna(subset=OBJECTIVES)  # not the steps that have no signal
    kinds = {"correct": rows.correct, "wrong": ~rows.correct, "truncated": rows.truncated}
    lengths = {kind: rows[chosen].groupby("step").length.mean() for kind, chosen in kinds.items()}
    pair = rows.groupby("step")[["advantage", "length"]]
    tables = [
        Titled(title="mean length", data=pd.DataFrame(lengths), unit="tokens"),
        Titled(
            title="correlation of advantage and length",
            data=pair.corr().advantage.unstack().length.to_frame("r"),
            unit="Pearson's r",
        ),
        Titled(
            title="weight of a question",
            data=_weights(weighed, "success_rate", "responses"),
            unit="1 = the mean question",
        ),
        _moved(weighed),
    ]
    for kind, chosen in (("correct", weighed.correct), ("wrong", ~weighed.correct)):
        tables.append(
            Titled(
                title=f"weight of a token, {kind}",
                data=_weights(weighed[chosen], "quarter", "tokens"),
                unit="1 = the mean token",
            )
        )
    logged = pd.DataFrame(read_metrics(run_dir.metrics)).set_index("step")
    for prefix, (title, unit) in LOGGED.items():
        data = logged.filter(like=prefix).dropna(how="all")
        tables.append(Titled(title=title, data=data, unit=unit, prefix=prefix))
    details = {
        "correlation": plain(rows[["advantage", "length"]].corr()),
        "questions": plain(_weights(weighed, ["step", "question", "success_rate"], "responses")),
    }
    return Report(tables=tables, details=details)


def _moved(weighed: pd.DataFrame) -> Titled:
    """How much of the weight each normalisation gives to other responses, by step."""
    after = {"only_std": "by std", "only_length": "by length", "grpo": "by both"}
    differences = weighed[[*after]].sub(weighed.dr_grpo, axis=0).abs()
    return Titled(
        title="weight moved by normalisation",
        data=(differences.groupby(weighed.step).sum() / 2).rename(columns=after),
        unit="share of the gradient's weight",
    )


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For JSON: a dictionary per row, its index included; nan becomes null."""
    return json.loads(table.reset_index().to_json(orient="records", double_precision=15))


def printed(table: Titled) -> str:
    """A table as text: files by what tells them apart, and at most 12 rows."""
    data = table.data
    if is_by_file(data):
        data = data.set_axis(file_labels(data), axis=0)
    text = data.to_string(float_format="{:.3g}".format, max_rows=12)
    return f"{table.title} ({table.unit})\n{text}"


def is_by_file(data: pd.DataFrame) -> bool:
    """Whether the rows are files (and how their responses were drawn)."""
    return list(data.index.names) == ["file", "sampling"]


def file_labels(data: pd.DataFrame) -> list[str]:
    """A short name for each row: the end of its path that no other file has, and the sampling.

    Example:
        runs/a/rollouts/step_000010.jsonl.zst, base.jsonl -> "step 10", "base greedy"
    """
    paths = [Path(file) for file, _ in data.index]
    samplings = {sampling for _, sampling in data.index}
    num_parts = 1
    while len({path.parts[-num_parts:] for path in paths}) < len(set(paths)):
        num_parts += 1
    labels = []
    for path, (_, sampling) in zip(paths, data.index, strict=True):
        step = step_of_path(path)
        name = path.name.split(".")[0] if step is None else f"step {step}"
        folders = path.parts[-num_parts:-1]
        parts = [*folders, name]
        label = "/".join(parts)
        labels.append(f"{label} {sampling}".strip() if len(samplings) > 1 else label)
    return labels
