"""A training step on the same packed tokens: the policy against transformers and torch's AdamW.

    .venv/bin/python benchmarks/step_vs_transformers.py

One core per rank, float32, a Qwen2 of 23 M parameters. Both sides sum clipped surrogates over the
same responses, clip the gradient's norm at 1 and take an AdamW step. transformers gets the samples
either one after the other in a row (its own masks keep them apart) or side by side with padding,
with its `sdpa` attention: the faster of the two is the peer. Sides alternate; medians of all steps.
The first loss and gradient norm of every side are in the report: they are the same numbers.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

MODEL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 16_384,
    "max_position_embeddings": 2048,
}
SAMPLES, MAX_TOKENS, LR = 16, 2048, 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {  # ranks, settings
    "tp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
PEERS = ("transformers_packed", "transformers_padded")


def make_samples() -> list[Any]:
    """Ragged: prompts of 32 to 96 tokens, responses of up to 256, advantages of both signs."""
    from megatron_zero.types import TrainSample

    rng = random.Random(0)
    samples = []
    for i in range(SAMPLES):
        prompt, response = rng.randint(32, 96), min(int(rng.lognormvariate(4.6, 0.6)), 256)
        tokens = tuple(rng.randrange(MODEL["vocab_size"]) for _ in range(prompt + response))
        samples.append(
            TrainSample(
                token_ids=tokens,
                prompt_length=prompt,
                rollout_logprobs=(-9.7,) * response,
                advantage=(-0.25, 0.75)[i % 2],
            )
        )
    return samples


def timed(steps: int, step: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Two steps to warm up, then `steps`; the first one's values."""
    first = step()
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "loss": first["loss"], "grad_norm": first["grad_norm"]}


def run_policy(layout: str, directory: Path, steps: int, profile: Path | None) -> None:
    """Under torchrun: the policy's steps in one layout."""
    from megatron_zero.batching import build_global_batch
    from megatron_zero.build import packing
    from megatron_zero.config import OptimizerConfig, ParallelConfig
    from megatron_zero.convert.families import mapping_for
    from megatron_zero.convert.safetensors_io import SafetensorsSource
    from megatron_zero.losses import policy_objective
    from megatron_zero.policy.model import padded_vocab_size
    from megatron_zero.policy.parallel import initialize
    from tests import tiny

    parallel = ParallelConfig(**LAYOUTS[layout][1])  # type: ignore[arg-type]
    topology = initialize(parallel, seed=0)
    from megatron_zero.policy.policy import Policy

    hf_config = json.loads((directory / "config.json").read_text())
    mapping = mapping_for(hf_config, padded_vocab_size(MODEL["vocab_size"], topology.tp_size))
    config = tiny.run_config(global_batch_size=SAMPLES, max_tokens=MAX_TOKENS)
    policy = Policy(
        mapping,
        SafetensorsSource(directory),
        topology,
        parallel=parallel,
        optimizer=OptimizerConfig(lr=LR, weight_decay=0.0, clip_grad=1.0),
        dtype="fp32",
        objective=policy_objective(config.loss),
        num_optimizer_steps=1000,
    )
    packed = packing(parallel, topology, MAX_TOKENS, mapping)
    (minibatch,) = build_global_batch(make_samples(), config, packed, step=0).minibatches

    def step() -> dict[str, float]:
        loss = policy.forward_backward(minibatch).values["policy/loss"]
        return {"loss": loss, "grad_norm": policy.optimizer_step().values["policy/grad_norm"]}

    with cProfile.Profile() as profiler:
        found = timed(steps, step)
    if topology.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
        if profile:
            with profile.open("w") as file:
                pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(25)


def run_transformers(side: str, directory: Path, steps: int) -> None:
    """In this process: the peer's steps."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests import tiny

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    samples = make_samples()
    lengths = [len(s.token_ids) - 1 for s in samples]
    loss_config = tiny.run_config().loss
    denominator = SAMPLES * tiny.MAX_RESPONSE
    if side == "transformers_packed":
        rows = [list(range(SAMPLES))]
        width = sum(lengths)
    else:
        rows = [[i] for i in range(SAMPLES)]
        width = max(lengths)
    shape = (len(rows), width)
    ids, labels, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    is_token, advantages = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    trained = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            sample, end = samples[i], start + lengths[i]
            ids[r, start:end] = torch.tensor(sample.token_ids[:-1])
            labels[r, start:end] = torch.tensor(sample.token_ids[1:])
            positions[r, start:end] = torch.arange(lengths[i])
            is_token[r, start:end] = 1
            trained[r, start + sample.prompt_length - 1 : end] = True
            advantages[r, start:end] = sample.advantage
            start = end
    mask = None if side == "transformers_packed" else is_token

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        hidden = model.model(
            ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logprobs = model.lm_head(hidden[trained]).log_softmax(-1)
        logprobs = logprobs.gather(1, labels[trained][:, None])[:, 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        bounded = ratio.clamp(1 - loss_config.clip_low, 1 + loss_config.clip_high)
        gain = torch.minimum(ratio * advantages[trained], bounded * advantages[trained])
        loss = -gain.sum() / denominator
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    print("RESULT " + json.dumps(timed(steps, step)), flush=True)


def launch(side: str, directory: Path, steps: int, profile: Path | None) -> dict[str, Any]:
    """One side in processes of its own; its result."""
    command = [sys.executable, __file__, "--side", side, "--model", str(directory)]
    if side in LAYOUTS:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command[1:1] = [*torchrun, f"--nproc-per-node={LAYOUTS[side][0]}"]
    command += ["--steps", str(steps), *(["--profile", str(profile)] if profile else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "RESULT " not in result.stdout:
        raise RuntimeError(f"{side}: {result.stderr[-3000:]}")
    return json.loads(result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/step.json")
    parser.add_argument("--profile", type=Path, help="tp1's profile, to this file")
    for hidden in ("--side", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side in LAYOUTS:
        run_policy(options.side, Path(options.model), options.steps, options.profile)
        return
    if options.side:
        run_transformers(options.side, Path(options.model), options.steps)
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*PEERS, *LAYOUTS)}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        for _ in range(options.rounds):
            for side, found in runs.items():
                profile = options.profile if side == "tp1" else None
                found.append(launch(side, Path(directory), options.steps, profile))
                median = statistics.median(found[-1]["seconds"])
                print(f"{side}: {median:.3f} s, loss {found[-1]['loss']:.9f}", flush=True)
    report(options, runs)


def write_model(directory: Path) -> None:
    """Random weights in an HF directory, the same for every side."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests import tiny

    torch.manual_seed(0)
    values = tiny.hf_config(tied=False, **MODEL)
    del values["model_type"], values["architectures"]
    Qwen2ForCausalLM(Qwen2Config(**values)).save_pretrained(directory)


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Ratios, to the console and to a file."""
    from megatron_zero.observability.environment import collect_environment

    median = {
        side: statistics.median(s for run in found for s in run["seconds"])
        for side, found in runs.items()
    }
    tokens = sum(len(s.token_ids) - 1 for s in make_samples())
    peer = min(PEERS, key=lambda side: median[side])
    result = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"benchmarks/step_vs_transformers.py --rounds {options.rounds}",
        "environment": collect_environment({}, world_size=2),
        "model": MODEL,
        "tokens": tokens,
        "peer": peer,
        "median_s": median,
        "tokens_per_s": {side: tokens / seconds for side, seconds in median.items()},
        "ratio": {side: median[peer] / median[side] for side in LAYOUTS},
        "ratio_per_core": {
            side: median[peer] / median[side] / num_ranks
            for side, (num_ranks, _) in LAYOUTS.items()
        },
        "first": {s: {n: f[0][n] for n in ("loss", "grad_norm")} for s, f in runs.items()},
        "runs": runs,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"peer {peer}: {tokens / median[peer]:.0f} tokens/s", result["ratio"])


if __name__ == "__main__":
    main()
