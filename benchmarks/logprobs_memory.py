"""Memory and time of chunked logprobs from hidden states against the full float32 computation.

    .venv/bin/python benchmarks/logprobs_memory.py

4,096 tokens, a vocabulary of 151,936 (Qwen2.5), values and gradients, one core. Each measurement is
a process of its own; its peak is what the step adds to the resident memory of its inputs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

TOKENS, VOCAB, HIDDEN = 4096, 151_936, 896
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str) -> dict[str, float]:
    """One forward and backward pass in this process."""
    import torch
    import torch.distributed as dist

    from megatron_zero.policy.logprobs import linear_logprobs

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(TOKENS, HIDDEN).normal_(generator=generator).requires_grad_()
    weight = torch.empty(VOCAB, HIDDEN).normal_(0, 0.02, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    before, start = peak_mib(), time.perf_counter()
    if side == "chunked":
        logprobs, entropy = linear_logprobs(
            hidden, weight, labels, tp_group=dist.group.WORLD, vocab_size=VOCAB
        )
    else:
        log_p = (hidden @ weight.t()).log_softmax(-1)
        logprobs = log_p.gather(1, labels[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
    logprobs.sum().backward()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_mib": peak_mib() - before,
        "logprob_sum": logprobs.double().sum().item(),
        "entropy_sum": entropy.double().sum().item(),
        "grad_hidden_norm": hidden.grad.double().norm().item(),
        "grad_weight_norm": weight.grad.double().norm().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/logprobs.json")
    parser.add_argument("--side", choices=["chunked", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side)))
        return
    runs: dict[str, list[dict[str, float]]] = {"chunked": [], "full": []}
    for _ in range(options.rounds):
        for side, found in runs.items():
            command = [sys.executable, __file__, "--side", side]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            found.append(json.loads(result.stdout.splitlines()[-1]))
            print(side, found[-1], flush=True)
    from megatron_zero.observability.environment import collect_environment

    median = {
        side: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for side, found in runs.items()
    }
    report = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "benchmarks/logprobs_memory.py",
        "environment": collect_environment({}, world_size=1),
        "tokens": TOKENS,
        "vocabulary": VOCAB,
        "hidden": HIDDEN,
        "median": median,
        "memory_ratio": median["chunked"]["peak_mib"] / median["full"]["peak_mib"],
        "time_ratio": median["chunked"]["seconds"] / median["full"]["seconds"],
        "runs": runs,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"memory {report['memory_ratio']:.3f}, time {report['time_ratio']:.2f} of the full one")


if __name__ == "__main__":
    main()
