"""`megatron-zero analyze <what> …`: what responses say, and what weighs in a run's gradient.

    analyze bias RUN_DIR             lengths and gradient weights, from a run's rollouts
    analyze self-reflection FILES…   phrases of self-reflection, and with --judge a model's opinion
    analyze answering FILES…         does the model answer the question, or write it on? (a judge)

The command line alone: what reads and draws (`analyze_tables`, `analyze_figure`) needs packages
that take seconds to import, and the help should not.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_zero.launch_args import progress
from megatron_zero.observability.run_dir import write_atomically

LOCAL_JUDGE = "http://localhost:8000/v1"  # where `vllm serve` listens

_FILES = """\
FILE is one of
  runs/NAME                              a run: the rollouts of all of its steps
  runs/NAME/rollouts/step_000010.jsonl.zst
                                         the rollouts of one step
  runs/NAME/eval/step_000010.jsonl       the responses of an evaluation
  DIR/TEMPLATE.jsonl                     the responses of `megatron-zero eval --out DIR`"""
_JUDGE = """\
A judge is any model behind an OpenAI-compatible endpoint, for instance
  vllm serve Qwen/Qwen2.5-7B-Instruct --max-model-len 16384
Its replies are kept in OUT/{name}.replies.jsonl; what is in there is not
asked again. A key is taken from OPENAI_API_KEY."""
_RESULTS = """\
Prints tables, draws them as OUT/{name}.png, and writes everything to
OUT/{name}.json."""

EPILOG = """\
examples:
  megatron-zero analyze bias runs/quickstart
  megatron-zero analyze self-reflection runs/quickstart

Each analysis has its own options and examples: megatron-zero analyze bias --help
What the numbers mean is in docs/analysis.md."""

SUMMARIES = {
    "bias": "lengths and gradient weights of a run: what GRPO's two divisions would change",
    "self-reflection": "phrases of self-reflection in responses; with --judge a model's opinion",
    "answering": "whether responses answer the question or write it on, as a judge says",
}
EPILOGS = {
    "bias": f"""\
{_RESULTS}

RUN_DIR is the directory of a training run that kept rollouts (logging.rollouts_every_num_steps).

examples:
  megatron-zero analyze bias runs/quickstart
  megatron-zero analyze bias runs/quickstart --out runs/quickstart/analysis""",
    "self-reflection": f"""\
{_RESULTS}
Greedy and sampled responses are counted apart.

{_FILES}

{_JUDGE}

examples:
  megatron-zero analyze self-reflection runs/quickstart
  megatron-zero analyze self-reflection base.jsonl trained.jsonl --out comparison
  megatron-zero analyze self-reflection base.jsonl --judge {LOCAL_JUDGE}""",
    "answering": f"""\
{_RESULTS}
Greedy and sampled responses are counted apart.

{_FILES}

{_JUDGE}

examples:
  megatron-zero analyze answering base.jsonl instruct.jsonl
  megatron-zero analyze answering base.jsonl --judge https://host/v1 --judge-model NAME""",
}


class _Parser(argparse.ArgumentParser):
    """Mistakes are one sentence, as everywhere in this program."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("megatron-zero ")
        raise ValueError(f"{name}: {message}; see megatron-zero {name} --help")


def make_parser() -> argparse.ArgumentParser:
    """One subcommand per analysis, each with its own options, explanation and examples."""
    parser = _Parser(
        "megatron-zero analyze",
        description="What responses say, and what weighs in a run's gradient: tables and a figure.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="analysis", required=True, metavar="ANALYSIS", title="analyses"
    )
    for name, summary in SUMMARIES.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=EPILOGS[name].format(name=name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        metavar, what = "FILE", "what runs and evaluations wrote, see below"
        if name == "bias":
            metavar, what = "RUN_DIR", "of a training run"
        command.add_argument("paths", nargs="+", type=Path, metavar=metavar, help=what)
        text = "folder of the results (default: %(default)s)"
        command.add_argument("--out", type=Path, default=Path("analysis"), metavar="OUT", help=text)
        if name != "bias":
            _add_judge(command, default=LOCAL_JUDGE if name == "answering" else "")
    return parser


def _add_judge(command: argparse.ArgumentParser, *, default: str) -> None:
    add = command.add_argument
    shown = default or "none is asked"
    add("--judge", metavar="URL", default=default, help=f"endpoint of the judge (default: {shown})")
    text = "which model, where it serves several (default: the one that is served)"
    add("--judge-model", metavar="NAME", default="", help=text)
    text = "requests at once (default: %(default)s)"
    add("--concurrency", metavar="N", type=int, default=16, help=text)


def main(argv: Sequence[str]) -> int:
    """Run one analysis: everything as JSON, its tables as a figure and printed.

    Raises:
        ValueError: a file is not what it should be, or the judge does not answer.
    """
    args = make_parser().parse_args(argv)
    if args.analysis == "bias" and len(args.paths) > 1:
        raise ValueError("analyze bias: takes one run directory")
    progress("importing pandas and matplotlib")
    try:
        from megatron_zero.analyze_figure import draw
        from megatron_zero.analyze_tables import Judge, analyze_bias, analyze_responses, printed
    except ImportError as error:
        raise ValueError(f"analyze: {error}: pip install 'megatron_zero[analysis]'") from None
    if args.analysis == "bias":
        report = analyze_bias(args.paths[0], progress=progress)
    else:
        judge = None
        if args.judge:
            judge = Judge(url=args.judge, model=args.judge_model, concurrency=args.concurrency)
        report = analyze_responses(
            args.analysis, args.paths, args.out, judge=judge, progress=progress
        )
    path = args.out / args.analysis
    write_atomically(path.with_suffix(".json"), json.dumps(report.as_json(), indent=1).encode())
    progress("drawing the figure")
    draw(report.shown(), path.with_suffix(".png"))
    for table in report.shown():
        print(f"\n{printed(table)}")
    print("", path.with_suffix(".json"), path.with_suffix(".png"), sep="\n")
    return 0
