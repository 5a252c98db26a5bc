"""`megatron-zero eval`: its options, checked before anything heavy is imported or started.

The work is in `benchmark_run`, which every process of the job runs; docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_zero.checks import at_least, fail
from megatron_zero.config import TEMPLATES, ModelConfig, RolloutConfig, RunConfig
from megatron_zero.config_io import apply_overrides
from megatron_zero.data.preflight import check_data_files
from megatron_zero.failures import reported, user_errors
from megatron_zero.hf_config import newest_export, read_hf_config
from megatron_zero.launch_args import (
    become_torchrun,
    count_gpus,
    is_launched,
    job,
    progress,
    world_size,
)
from megatron_zero.layout import check_cpu_engine, check_engine_layout
from megatron_zero.preflight import check_tokenizer

# option -> setting, default, help; everything else is set by its dotted name
OPTIONS = {
    "template": ("data.template", "qwen_math", f"one of {', '.join(TEMPLATES)}"),
    "few-shot": ("data.few_shot", "", "template few_shot with a file's problem, solution"),
    "benchmarks": ("evaluation.datasets", "aime,amc,math,minerva,olympiad_bench", "data sets"),
    "n": ("evaluation.num_samples", "1", "samples per problem, besides the greedy response"),
    "temperature": ("evaluation.temperature", "0", "of the samples; 0: only greedy"),
    "top-p": ("evaluation.top_p", "1", "samples: the likeliest tokens that have so much; 1: all"),
    "top-k": ("evaluation.top_k", "0", "samples: so many of the likeliest tokens; 0: all"),
    "max-tokens": ("evaluation.max_response_tokens", "3000", "longest response"),
    "max-problems": ("evaluation.max_prompts", "0", "of each benchmark, the first; 0: all"),
    "data-dir": ("data.data_dir", "", "folder that is looked into before the hub"),
}


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The command line, and the settings that it makes.

    Raises:
        ValueError: a setting that is not valid.
        SystemExit: an option that is not, or `--help`.
    """
    usage = "megatron-zero eval <hf dir or id> --out DIR [options] [key=value ...]\n       "
    usage += "megatron-zero eval --compare A.json B.json"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    parser.add_argument("words", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="made or continued")
    for option, (path, default, text) in OPTIONS.items():
        parser.add_argument(f"--{option}", default=default, dest=path, metavar="X", help=text)
    parser.add_argument("--sweep-templates", action="store_true", help="every template, a row each")
    parser.add_argument("--save-every", type=int, default=512, help="responses between writes")
    parser.add_argument("--nproc", type=int, default=count_gpus() or 1, help="processes")
    args = parser.parse_intermixed_args(list(argv))
    at_least(args, "eval", 1, "save_every", "nproc")
    model, *overrides = args.words
    model = model_of(model)
    given = [f"{path}={getattr(args, path)}" for path, _, _ in OPTIONS.values()]
    given += ["data.template=few_shot"] * bool(getattr(args, "data.few_shot"))
    rollout = RolloutConfig(gpu_memory_utilization=0.9)  # nothing else is on the GPU
    config = RunConfig(name="eval", model=ModelConfig(path=model), rollout=rollout)
    config = apply_overrides(config, given + overrides)
    if not config.evaluation.datasets:
        fail("--benchmarks", "", "must name a data set")
    return args, config


def model_of(path: str) -> str:
    """`path`, but of a run directory, or its folder `hf`, the newest model in it.

    Raises:
        ValueError: a run that has exported none.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        return path
    export = newest_export(folder)
    if export is None and (folder / "config.yaml").exists():
        valid = "a run without a model in hf/; tools/convert/megatron_to_hf.py makes one of a "
        valid += "folder in its checkpoints/"
        fail("model.path", path, valid)
    return str(export or path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: check it and become torchrun, or, under torchrun, be one of its ranks."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with reported():
        with user_errors():
            if argv[:1] == ["--compare"] and len(argv) == 3:
                from megatron_zero.benchmark_tables import compare

                print(compare(*map(Path, argv[1:])), end="")
                return 0
            args, config = parse_args(argv)
            hf_config = read_hf_config(config.model)
            num_processes = world_size() if is_launched() else args.nproc
            check_engine_layout(config.rollout, hf_config, num_processes, num_processes)
            if not count_gpus():
                check_cpu_engine(config.model, hf_config)
            check_tokenizer(config.model)
            from megatron_zero.rewards.golds import check_readable  # sympy: not for `--help`

            check_data_files(config, check_golds=check_readable)
            if not is_launched():
                processes = f"{args.nproc} process{'es' if args.nproc > 1 else ''}"
                print(f"eval: {config.model.path} -> {args.out}, {processes}", flush=True)
                become_torchrun("megatron_zero.eval", argv, args.nproc)
        with job():
            progress("importing torch and transformers")
            from megatron_zero.benchmark_run import BenchmarkRun

            BenchmarkRun(config, args.sweep_templates, args.save_every).run(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
