"""Whole RL steps of this library against TRL's GRPOTrainer, alternating, on two CPU cores.

    .venv/bin/python benchmarks/rl_step_vs_trl.py            # all: wants an idle machine
    .venv/bin/python benchmarks/rl_step_vs_trl.py --quick    # does it work?

A step is rollout, grading, update and weight sync. Both sides get the same randomly initialised
Qwen2 (float32), the same prompts in the same order, group size, token budget, temperature,
learning rate and optimizer: on-policy Dr. GRPO, one optimizer step per rollout. Each block is a
fresh process: this library's own program (`megatron-zero train`), then TRL's trainer in an
environment of its own (`.venv-trl`, made on demand). A step's time is what passes between the ends
of two steps, so nothing that either program does in between is left out.

What keeps it fair: both sides do a forward and a backward pass over every sample (`ours`); the row
`ours, skipping` shows the default, which leaves out samples whose gradient is exactly zero. Both
grade by the same rule; ours in its supervised worker processes. TRL is measured first in several
set-ups (`TRL_SETUPS`) and the blocks use the fastest.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the library beside this file, installed or not

from megatron_zero.config import (  # noqa: E402
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.config_io import save_config  # noqa: E402

TRL_VENV = ROOT / "benchmarks" / ".venv-trl"
TRL_PACKAGES = ["trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0"]
LR = 1e-6
NUM_PROCESSES = 2  # ours: one thread each
PHASES = ("rollout", "reward", "train", "sync")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model and a rollout. EOS is one of `vocab_size` about equally likely tokens."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_response_tokens: int
    warmup_steps: int  # of a block, not counted
    steps: int  # of a block
    max_tokens_per_microbatch: int
    num_prompts: int = 16
    group_size: int = 8
    max_prompt_tokens: int = 32


SETTINGS = (
    Setting(
        name="0.6M",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_response_tokens=64,
        warmup_steps=4,
        steps=12,
        max_tokens_per_microbatch=8192,
    ),
    Setting(
        name="23M",
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=80,
        max_response_tokens=128,
        warmup_steps=2,
        steps=4,
        max_tokens_per_microbatch=8192,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrlSetup:
    """How TRL uses the two cores."""

    num_processes: int
    threads: int
    samples_per_pass: int
    generation: str = "generate"

    def __str__(self) -> str:
        return (
            f"{self.num_processes} x {self.threads} threads, {self.samples_per_pass} per pass, "
            f"{self.generation}"
        )


TRL_SETUPS = (
    TrlSetup(num_processes=2, threads=1, samples_per_pass=16),
    TrlSetup(num_processes=2, threads=1, samples_per_pass=64),
    TrlSetup(num_processes=2, threads=1, samples_per_pass=4),
    TrlSetup(num_processes=1, threads=2, samples_per_pass=128),
    TrlSetup(num_processes=1, threads=2, samples_per_pass=16),
    TrlSetup(num_processes=2, threads=1, samples_per_pass=16, generation="continuous"),
)

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=()[]<>.,:;!?&#%@"
_PAIRS = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of")
_PAIRS += ("ed", "is", "it", "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le")
_PAIRS += ("ve", "co", "me", "de", "hi", "ri", "ro", "ic", "ne", "ea", "ra", "ce", "li", "ch", "ll")
_BOXES = ("\\boxed{0}", "\\boxed{1}", "\\boxed{2}", "\\boxed{3}")


def build_tokenizer(vocab_size: int) -> Any:
    """Characters, pairs and whole boxed answers as single tokens: `vocab_size` in all.

    So a random model gives answers: the last box of a response is one of four, equally likely.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    room = vocab_size - len(special) - len(_BOXES)
    characters = list(_CHARACTERS[:room])
    pairs = [pair for pair in _PAIRS if set(pair) <= set(characters)][: room - len(characters)]
    names = [*special, *characters, *pairs]
    assert len(names) + len(_BOXES) == vocab_size, "more pairs are needed"
    merges = [(pair[0], pair[1]) for pair in pairs]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.add_tokens(list(_BOXES))
    return fast


def write_inputs(setting: Setting, folder: Path) -> tuple[Path, Path]:
    """The model with its tokenizer, and the prompts: what both sides read."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(setting.vocab_size)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=setting.num_hidden_layers,
        num_attention_heads=setting.num_attention_heads,
        num_key_value_heads=setting.num_key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model_dir = folder / "model"
    Qwen2ForCausalLM(config).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rng = random.Random(0)
    prompts = folder / "prompts.jsonl"
    lines = []
    for _ in range(setting.num_prompts * 64):
        length = rng.randint(setting.max_prompt_tokens // 2, setting.max_prompt_tokens)
        problem = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length))
        answers = [str(answer) for answer in rng.sample(range(4), k=2)]
        lines.append(json.dumps({"problem": problem, "answers": answers}) + "\n")
    prompts.write_text("".join(lines))
    return model_dir, prompts


def run_ours(
    setting: Setting, model: Path, prompts: Path, folder: Path, *, skip: bool
) -> dict[str, Any]:
    """One block of this library: `megatron-zero train`, its lines on the console timed."""
    config = RunConfig(
        name="block",
        runs_dir=str(folder),
        num_steps=setting.warmup_steps + setting.steps,
        model=ModelConfig(path=str(model), dtype="fp32"),
        data=DataConfig(
            dataset=str(prompts),
            template="no",
            max_prompt_tokens=setting.max_prompt_tokens,
            shuffle=False,
        ),
        rollout=RolloutConfig(
            num_prompts_per_step=setting.num_prompts,
            group_size=setting.group_size,
            max_response_tokens=setting.max_response_tokens,
        ),
        batch=BatchConfig(
            global_batch_size=setting.num_prompts * setting.group_size,
            max_tokens_per_microbatch=setting.max_tokens_per_microbatch,
            skip_zero_advantage=skip,
        ),
        optimizer=OptimizerConfig(lr=LR),
        evaluation=EvaluationConfig(datasets=[]),
        checkpoint=CheckpointConfig(save_hf=False),
        logging=LoggingConfig(tensorboard=False, rollouts_every_num_steps=0),
    )
    path = folder / "block.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "megatron_zero.cli", "train", str(path)]
    steps = _timed_steps([*command, "--nproc", str(NUM_PROCESSES)], threads=1)
    metrics = [json.loads(t) for t in (folder / "block/metrics.jsonl").read_text().splitlines()]
    records = [record for record in metrics if "time/step_s" in record][1:]
    assert len(steps) == len(records) == config.num_steps - 1, "one line per step"
    num_responses = setting.num_prompts * setting.group_size
    for step, record in zip(steps, records, strict=True):
        step |= {f"{phase}_s": record[f"time/{phase}_s"] for phase in PHASES}
    environment = json.loads((folder / "block/environment.json").read_text())
    warm = setting.warmup_steps - 1
    return _block(
        steps[warm:],
        [record["response/length_mean"] * num_responses for record in records[warm:]],
        {
            "num_responses": num_responses,
            "reward_mean": statistics.fmean(r["reward/mean"] for r in records),
            "no_signal_frac": statistics.fmean(r["reward/no_signal_frac"] for r in records),
            "versions": environment["versions"],
            "kernels": environment["kernels"],
        },
    )


def run_trl(
    setting: Setting, setup: TrlSetup, model: Path, prompts: Path, folder: Path
) -> dict[str, Any]:
    """One block of TRL, in its own environment."""
    folder.mkdir(parents=True)
    num_responses = setting.num_prompts * setting.group_size
    job = {
        "model": str(model),
        "prompts": str(prompts),
        "output": str(folder / "report.json"),
        "num_steps": setting.warmup_steps + setting.steps,
        "num_prompts": setting.num_prompts,
        "group_size": setting.group_size,
        "max_response_tokens": setting.max_response_tokens,
        "lr": LR,
        **asdict(setup),
    }
    (folder / "job.json").write_text(json.dumps(job))
    launcher = [str(TRL_VENV / "bin" / "python"), "-m", "torch.distributed.run", "--standalone"]
    side = str(ROOT / "benchmarks" / "trl_side.py")
    launcher += [f"--nproc-per-node={setup.num_processes}", side, str(folder / "job.json")]
    steps = _timed_steps(launcher, threads=setup.threads)
    report = json.loads((folder / "report.json").read_text())
    assert len(steps) == len(report["steps"]) - 1, "one line per step"
    for step, phases in zip(steps, report["steps"][1:], strict=True):
        step |= phases
        step["train_s"] = step["step_s"] - phases["rollout_s"] - phases["reward_s"]
    return _block(
        steps[setting.warmup_steps - 1 :],
        report["tokens"][setting.warmup_steps :],
        {
            "num_responses": num_responses,
            "reward_mean": statistics.fmean(report["reward_mean"]),
            "no_signal_frac": statistics.fmean(report["no_signal_frac"]),
            **{k: report[k] for k in ("versions", "optimizer", "attention", "num_parameters")},
        },
    )


def _timed_steps(command: Sequence[str], *, threads: int) -> list[dict[str, float]]:
    """Run a command that prints a line `n/m ...` after each step; seconds of every step but one.

    `step_s` is wall-clock time between two lines, `cpu_s` what all processes of the command used
    meanwhile, on all cores: it says something on a busy machine too. The first step is left out,
    as nothing says when it began.

    Raises:
        RuntimeError: the command failed; with the end of its output.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    ends: list[tuple[float, float]] = []
    tail: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line)
            if re.match(r"\s*\d+/\d+ ", line):
                ends.append((time.perf_counter(), _cpu_seconds(process.pid)))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {process.returncode}:\n{''.join(tail)}")
    return [
        {"step_s": now - before, "cpu_s": cpu_now - cpu_before}
        for (before, cpu_before), (now, cpu_now) in itertools.pairwise(ends)
    ]


def _cpu_seconds(root: int) -> float:
    """User and system time so far of a process and all that descend from it."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it just ended
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {root}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def _block(
    steps: Sequence[dict[str, float]], tokens: Sequence[float], more: dict[str, Any]
) -> dict[str, Any]:
    """Median seconds per step and phase of one block, and the tokens its responses had."""
    names = sorted({name for step in steps for name in step})
    median = {n: statistics.median(step.get(n, 0.0) for step in steps) for n in names}
    return {
        **median,
        "all_step_s": [round(step["step_s"], 4) for step in steps],
        "mean_response_tokens": statistics.fmean(tokens) / more.pop("num_responses"),
        "response_tokens_per_s": sum(tokens) / sum(step["step_s"] for step in steps),
        **more,
    }


def ensure_trl_environment() -> None:
    """Make `.venv-trl` if it is not there: torch's CPU build first, then TRL."""
    stamp = TRL_VENV / "rl_step_vs_trl.json"
    setup = runpy.run_path(str(ROOT / "tools" / "setup" / "make_venv.py"))
    wanted = json.dumps([setup["TORCH"], *TRL_PACKAGES])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"making {TRL_VENV.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(TRL_VENV)], check=True)
    pip = [str(TRL_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, setup["TORCH"]], check=False).returncode:
        fallback = ["--index-url", setup["TORCH_CPU_INDEX"]]
        subprocess.run([*pip, *fallback, setup["TORCH"]], check=True)
    # torch once more, so that nothing replaces the CPU build.
    subprocess.run([*pip, setup["TORCH"], *TRL_PACKAGES], check=True)
    remove = [*pip[:3], "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"]
    subprocess.run(remove, check=False)
    stamp.write_text(wanted)


def fastest_trl_setup(
    setting: Setting, model: Path, prompts: Path, folder: Path
) -> tuple[TrlSetup, dict[str, Any]]:
    """Each set-up for a few steps; one that does not run is recorded as such."""
    short = replace(setting, warmup_steps=1, steps=2)
    tried: dict[str, Any] = {}
    best, best_s = TRL_SETUPS[0], float("inf")
    for i, setup in enumerate(TRL_SETUPS):
        try:
            seconds = run_trl(short, setup, model, prompts, folder / f"tune_{i}")["step_s"]
        except RuntimeError as error:
            tried[str(setup)] = str(error).strip().splitlines()[-1]
        else:
            tried[str(setup)] = round(seconds, 3)
            if seconds < best_s:
                best, best_s = setup, seconds
        print(f"  TRL, {setup}: {tried[str(setup)]}", flush=True)
    return best, tried


def measure(setting: Setting, *, blocks: int, tune: bool, folder: Path) -> dict[str, Any]:
    """All blocks of one setting, alternating."""
    model, prompts = write_inputs(setting, folder)
    setup, tried = TRL_SETUPS[0], {}
    if tune:
        setup, tried = fastest_trl_setup(setting, model, prompts, folder)
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "TRL": [], "ours, skipping": []}
    for block in range(blocks):
        for side, results in sides.items():
            where = folder / f"{side.replace(', ', '_')}_{block}"
            load = os.getloadavg()[0]
            if side == "TRL":
                result = run_trl(setting, setup, model, prompts, where)
            else:
                where.mkdir()
                skip = side == "ours, skipping"
                result = run_ours(setting, model, prompts, where, skip=skip)
            results.append({"load_before": load, **result})
            shutil.rmtree(where)
            print(f"  block {block + 1}, {side}: {result['step_s']:.3f} s/step", flush=True)
    step_s = {side: statistics.median(r["step_s"] for r in rs) for side, rs in sides.items()}
    return {
        "setting": asdict(setting),
        "trl_setup": asdict(setup),
        "trl_setups_tried_s": tried,
        "blocks": sides,
        "step_s": step_s,
        "ratio": step_s["TRL"] / step_s["ours"],
        "ratio_per_block": [
            trl["step_s"] / ours["step_s"]
            for ours, trl in zip(sides["ours"], sides["TRL"], strict=True)
        ],
        "ratio_skipping": step_s["TRL"] / step_s["ours, skipping"],
    }


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """One line per setting and side; times are medians over blocks of a block's median step."""
    columns = ("step", *PHASES, "cpu")
    titles = "".join(f"{c + ' s':>11}" for c in columns)
    print(f"\n{'model':<8}{'side':<16}{titles}{'tokens':>9}{'tokens/s':>10}{'ratio':>8}")
    for result in results:
        for side, blocks in result["blocks"].items():
            times = [statistics.median(b.get(f"{c}_s", 0.0) for b in blocks) for c in columns]
            length = statistics.fmean(b["mean_response_tokens"] for b in blocks)
            rate = statistics.median(b["response_tokens_per_s"] for b in blocks)
            ratio = result["step_s"]["TRL"] / result["step_s"][side]
            cells = "".join(f"{t:>11.3f}" for t in times)
            name = result["setting"]["name"]
            print(f"{name:<8}{side:<16}{cells}{length:>9.1f}{rate:>10,.0f}{ratio:>7.2f}x")


def hardware() -> dict[str, Any]:
    """The machine, as far as it matters here."""
    info = Path("/proc/cpuinfo").read_text()
    models = re.findall(r"model name\s*:\s*(.+)", info)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def git_commit() -> str:
    """The commit that was measured, with "+changes" when the files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    changes = "+changes" if git("status", "--porcelain", "--", "megatron_zero") else ""
    return git("rev-parse", "HEAD") + changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=[s.name for s in SETTINGS])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--no-tune", action="store_true", help="TRL in its first set-up")
    parser.add_argument("--quick", action="store_true", help="one short block, nothing kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/")
    args = parser.parse_args()
    ensure_trl_environment()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results = []
    for setting in (s for s in SETTINGS if s.name in args.settings):
        if args.quick:
            setting = replace(setting, warmup_steps=1, steps=1)
        print(f"{setting.name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="rl_step_vs_trl_") as folder:
            blocks = 1 if args.quick else args.blocks
            tune = not (args.quick or args.no_tune)
            results.append(measure(setting, blocks=blocks, tune=tune, folder=Path(folder)))
    print_table(results)
    if args.quick and args.output is None:
        return
    output = args.output or ROOT / "benchmarks" / "results" / "rl_step_vs_trl.json"
    record = {
        "started": started,
        "command": " ".join(["rl_step_vs_trl.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "hardware": hardware(),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
