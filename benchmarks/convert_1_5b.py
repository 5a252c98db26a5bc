"""Converting a 1.5 B-parameter Qwen2.5 checkpoint against copying its files, and peak memory.

    .venv/bin/python benchmarks/convert_1_5b.py            # 13 GB of disk, some minutes
    .venv/bin/python benchmarks/convert_1_5b.py --layers 2 # does it run?

Random bf16 weights in the sizes of Qwen2.5-1.5B, in files of 1 GB. Every round copies the files,
converts to Megatron's format and back, in turn, each to a new directory that is removed after; the
files are in the page cache for all of them. A copy is `shutil.copyfile` and `fsync` of each file,
as a conversion ends with its output on the disk; `copy_unsynced` leaves out the `fsync`. Each is a
process of its own with the same imports, whose time is a row of its own; peak memory is the largest
resident set of that process, from the kernel.
"""

import argparse
import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the library beside this file, installed or not

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LARGEST_TENSOR_BYTES = 151936 * 1536 * 2
MEMORY_BOUND_BYTES = 4 * LARGEST_TENSOR_BYTES + 400 * 10**6
NAMES = ("copy", "copy_unsynced", "hf_to_megatron", "megatron_to_hf")


def generate(directory: Path, layers: int) -> None:
    """Random numbers in the real shapes, in the order in which HF stores them."""
    import torch

    from megatron_zero.convert.families import mapping_for
    from megatron_zero.convert.safetensors_io import write_hf_checkpoint

    config = CONFIG | {"num_hidden_layers": layers}
    mapping = mapping_for(config)
    torch.manual_seed(0)
    pool = (0.02 * torch.randn(2**24 + 1)).to(torch.bfloat16)  # repeated: drawing takes minutes

    def tensor(name: str) -> torch.Tensor:
        shape = mapping.hf_shape(name)
        count = torch.Size(shape).numel()
        return pool.repeat(-(-count // len(pool)))[:count].view(shape)

    write_hf_checkpoint(
        directory, ((n, tensor(n)) for n in sorted(mapping.hf_names())), max_shard_bytes=10**9
    )
    (directory / "config.json").write_text(json.dumps(config))


def child(name: str, source: str, out: str) -> None:
    """One of `NAMES` in this process; the last line says how long and how much memory."""
    began = time.monotonic()
    from megatron_zero import convert

    to_megatron, to_hf = convert.hf_to_megatron, convert.megatron_to_hf
    phases = time_phases()
    imported, cpu = time.monotonic(), time.process_time()
    if name == "hf_to_megatron":
        to_megatron(source, out, progress=False)
    elif name == "megatron_to_hf":
        to_hf(source, out, progress=False)
    else:
        copy(Path(source), Path(out), sync=name == "copy")
    end = time.monotonic()
    # Not `ru_maxrss`, which begins with what the parent had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = {"peak": int(status["VmHWM"].split()[0]) * 1024, "cpu_s": time.process_time() - cpu}
    used["load"] = os.getloadavg()[0]
    print(json.dumps({"seconds": end - imported, "import_s": imported - began, **used, **phases}))


def time_phases() -> dict[str, float]:
    """Seconds of wall clock and of its thread in each phase, filled while a conversion runs."""
    from megatron_zero.convert import mapping, streaming, to_hf

    phases: dict[str, float] = {}

    def timed(owner: Any, function: str, phase: str) -> None:
        real = getattr(owner, function)

        def wrapper(*args: Any) -> Any:
            wall, cpu = time.monotonic(), time.thread_time()
            try:
                return real(*args)
            finally:
                used = {"s": time.monotonic() - wall, "cpu_s": time.thread_time() - cpu}
                for unit, value in used.items():
                    phases[f"{phase}_{unit}"] = phases.get(f"{phase}_{unit}", 0.0) + value

        setattr(owner, function, wrapper)

    timed(mapping.Mapping, "to_megatron_rows", "read")  # in a thread beside
    timed(to_hf.MegatronTensors, "read", "read")
    timed(streaming.OutputFile, "write", "write")  # with the digest, and the pages' first use
    timed(streaming.OutputFile, "sync", "sync")  # in a thread beside
    return phases


def run(name: str, source: Path, out: Path) -> dict[str, float]:
    """`child` in a process of its own, all files of `source` having been read just before."""
    for path in source.iterdir():
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    command = [sys.executable, __file__, "--child", name, str(source), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def copy(source: Path, out: Path, *, sync: bool) -> None:
    out.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, out / path.name)
        if sync:
            descriptor = os.open(out / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def measure(directory: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds of all four in turn; `megatron` stays for the way back."""
    hf, out = directory / "hf", directory / "out"
    run("hf_to_megatron", hf, directory / "megatron")
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            os.sync()  # nobody pays for what the one before left to be written
            source = directory / "megatron" if name == "megatron_to_hf" else hf
            block = run(name, source, out)
            blocks[name].append(block)
            if name == "megatron_to_hf":
                same = all(
                    subprocess.run(["cmp", path, out / path.name]).returncode == 0
                    for path in hf.glob("*.safetensors")
                )
                assert same, "the way back does not give the same files"
            shutil.rmtree(out)
            print(name, {key: round(value, 2) for key, value in block.items()}, flush=True)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's")
    parser.add_argument("--output", type=Path, help="default: results/convert_1_5b.json if whole")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    shared = runpy.run_path(str(ROOT / "benchmarks" / "rl_step_vs_trl.py"))
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        if shutil.disk_usage(directory).free < 13 * 10**9:
            sys.exit(f"{directory} has less than 13 GB free")
        generate(directory / "hf", options.layers)
        size = sum(path.stat().st_size for path in (directory / "hf").iterdir())
        load = os.getloadavg()[0]
        blocks = measure(directory, options.rounds)
    best = {key: min(block["seconds"] for block in blocks[key]) for key in NAMES}
    peaks = {key: max(block["peak"] for block in blocks[key]) for key in NAMES[2:]}
    summary = {
        key: {
            "gb_per_s": round(size / best[key] / 1e9, 3),
            "throughput_of_copy": round(best["copy"] / best[key], 3),
            "throughput_of_copy_unsynced": round(best["copy_unsynced"] / best[key], 3),
            "cpu_s": round(min(block["cpu_s"] for block in blocks[key]), 2),
            "copy_cpu_s": round(min(block["cpu_s"] for block in blocks["copy"]), 2),
            "peak_mb": round(peaks[key] / 1e6),
        }
        for key in NAMES[2:]
    }
    packages = ("torch", "safetensors", "xxhash")
    report = {
        "started": started,
        "command": " ".join(["convert_1_5b.py", *sys.argv[1:]]),
        "commit": shared["git_commit"](),
        "hardware": shared["hardware"](),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "load_before": load,
        "bytes": size,
        "memory_bound_mb": round(MEMORY_BOUND_BYTES / 1e6),
        "copy_gb_per_s": {key: round(size / best[key] / 1e9, 3) for key in NAMES[:2]},
        "results": summary,
        "blocks": blocks,
    }
    print(json.dumps({key: report[key] for key in ("copy_gb_per_s", "results")}, indent=2))
    output = options.output
    if output is None and options.layers == CONFIG["num_hidden_layers"]:
        output = ROOT / "benchmarks" / "results" / "convert_1_5b.json"
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
