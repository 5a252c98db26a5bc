"""One optimizer step of a policy on one GPU: tokens per second, and the share of the peak (MFU).

    PYTHONPATH=. torchrun --nproc-per-node 1 benchmarks/gpu/train_step.py --model 1.5b

Random weights in the shape of Qwen2.5, ragged responses packed as in a run, Dr. GRPO. Model FLOPs
are those of the matrix products, forward and twice that backward, attention within each sequence
only and causal, the output layer at the positions that are trained on; nothing that is computed
twice counts twice. `mfu` is of the vendor's dense bf16 peak, `matmul_fraction` of a large bf16
product measured here, just before.
"""

import argparse
import json
import math
import random
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_zero.batching import build_global_batch
from megatron_zero.build import packing
from megatron_zero.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.losses import policy_objective
from megatron_zero.observability.environment import collect_environment
from megatron_zero.policy.parallel import initialize
from megatron_zero.types import TrainSample
from tests import tiny
from tests.gpu.layers import use_layers

ROOT = Path(__file__).parents[2]
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250}  # bf16, dense
GROUP_SIZE = 8


def shape(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151_936,
        "max_position_embeddings": 4096,
    }


MODELS = {
    "tiny": {},  # to see whether this runs, anywhere
    "0.5b": shape(896, 4864, 24, 14, 2),
    "1.5b": shape(1536, 8960, 28, 12, 2),
}


def make_samples(number: int, vocab_size: int, longest: int) -> list[TrainSample]:
    """Prompts of about 100 tokens, responses log-normal around a quarter of the longest."""
    rng = random.Random(0)
    made = []
    for _ in range(number):
        prompt = rng.randint(longest // 40 + 1, longest // 20 + 2)
        response = max(1, min(int(longest / 4 * rng.lognormvariate(0, 0.7)), longest))
        made.append(
            TrainSample(
                token_ids=tuple(rng.randrange(vocab_size) for _ in range(prompt + response)),
                prompt_length=prompt,
                rollout_logprobs=(-math.log(vocab_size),) * response,
                advantage=rng.choice([-0.25, 0.75]),
            )
        )
    return made


def model_flops(config: dict[str, Any], samples: list[TrainSample]) -> float:
    """Of one forward and backward pass over the samples."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads
    attention_weights = hidden * head_dim * (2 * heads + 2 * config["num_key_value_heads"])
    layer_weights = attention_weights + 3 * hidden * config["intermediate_size"]
    total = 0.0
    for sample in samples:
        length = len(sample.token_ids) - 1
        # scores and values: 2 x 2 x length^2 x hidden, half of it masked
        layer = 2 * length * layer_weights + 2 * length**2 * heads * head_dim
        output = 2 * sample.response_length * hidden * config["vocab_size"]
        total += 3 * (config["num_hidden_layers"] * layer + output)
    return total


def synchronize() -> float:
    """The time when everything so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_tflops(device: torch.device, size: int, rounds: int = 20) -> float:
    """A large bf16 product on random data."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    start = synchronize()
    for _ in range(rounds):
        a @ b
    return 2 * size**3 * rounds / (synchronize() - start) / 1e12


def build_policy(options: argparse.Namespace, hf_config: dict[str, Any], topology: Any) -> Any:
    with use_layers(options.layers):
        from megatron_zero.policy.policy import Policy

        mapping = mapping_for(hf_config, hf_config["vocab_size"])
        return Policy(
            mapping,
            RandomSource(mapping, 0),
            topology,
            parallel=ParallelConfig(recompute=options.recompute),
            optimizer=OptimizerConfig(),
            dtype="bf16",
            objective=policy_objective(tiny.run_config().loss),
            num_optimizer_steps=100,
        )


def measure(policy: Any, batch: Any, steps: int) -> list[dict[str, float]]:
    """Seconds of each part of each step, after two that warm up."""
    measured = []
    for _ in range(steps + 2):
        start = synchronize()
        minibatch = policy.with_old_logprobs(batch).minibatches[0]
        scored = synchronize()
        metrics = policy.forward_backward(minibatch).values
        summed = synchronize()
        policy.optimizer_step()
        measured.append(
            {
                "old_logprobs_s": scored - start,
                "forward_backward_s": summed - scored,
                "optimizer_s": synchronize() - summed,
                "loss_is_finite": float(math.isfinite(metrics["policy/loss"])),
            }
        )
    return measured[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="0.5b")
    parser.add_argument("--layers", choices=["local", "transformer_engine"])
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--samples", type=int, default=64, help="responses in the step")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="in a microbatch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    topology = initialize(ParallelConfig(), seed=0)
    from megatron_zero.policy.model import layer_implementation

    options.layers = options.layers or layer_implementation()
    hf_config = tiny.hf_config(tied=bool(MODELS[options.model]), **MODELS[options.model])
    longest = min(3000, hf_config["max_position_embeddings"] // 2)
    samples = make_samples(options.samples, hf_config["vocab_size"], longest)
    config = RunConfig(
        name="train_step",
        model=ModelConfig(init="random", tokenizer="characters"),
        rollout=RolloutConfig(
            num_prompts_per_step=options.samples // GROUP_SIZE,
            group_size=GROUP_SIZE,
            max_response_tokens=longest,
        ),
        batch=BatchConfig(global_batch_size=options.samples, skip_zero_advantage=False),
    )
    policy = build_policy(options, hf_config, topology)
    packed = packing(ParallelConfig(), topology, options.max_tokens, policy.mapping)
    batch = build_global_batch(samples, config, packed, step=0)
    on_gpu = topology.device.type == "cuda"
    matmul = matmul_tflops(topology.device, 8192 if on_gpu else 512)
    runs = measure(policy, batch, options.steps)
    write(options, policy, samples, hf_config, runs, matmul)
    dist.destroy_process_group()


def write(
    options: argparse.Namespace,
    policy: Any,
    samples: list[TrainSample],
    hf_config: dict[str, Any],
    runs: list[dict[str, float]],
    matmul: float,
) -> None:
    """The report, to the console and to a file."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    seconds = median["forward_backward_s"] + median["optimizer_s"]
    tokens = sum(len(sample.token_ids) - 1 for sample in samples)
    achieved = model_flops(hf_config, samples) / seconds / 1e12
    median |= {
        "tokens_per_s": tokens / seconds,
        "model_tflops": achieved,
        "matmul_fraction": achieved / matmul,
        "mfu": achieved / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }
    report = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": collect_environment(policy.kernels(), world_size=1),
        "kernels": policy.kernels() | {"layers": options.layers},
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "device": device,
        "tokens": tokens,
        "matmul_tflops": matmul,
        "peak_tflops": peak,
        "median": median,
        "runs": runs,
    }
    name = f"gpu_train_step_{options.model}_{options.layers}.json"
    output = options.output or ROOT / "benchmarks" / "results" / name
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(median, indent=2))


if __name__ == "__main__":
    main()
