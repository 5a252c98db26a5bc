"""TRL's side of `rl_step_vs_trl.py`: one block of Dr. GRPO steps, under TRL's own Python.

    torchrun --nproc-per-node 2 trl_side.py job.json

Prints a line at the end of every step, by which the driver times it, and reports what each step's
phases took. The job's fields are those of `Job`.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# Without bounds it takes a share of the machine's memory, in every process, and is killed.
_CONTINUOUS = {
    "page_size": 32,
    "num_blocks": 1024,
    "max_batch_tokens": 2048,
    "use_cuda_graph": False,
    "use_async_batching": False,
}
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One block, as the driver writes it to `job.json`."""

    model: str  # HF folder with weights and tokenizer
    prompts: str  # JSON lines: problem, answers
    output: str  # written by rank 0
    num_steps: int  # warm-up included
    num_prompts: int
    group_size: int
    max_response_tokens: int
    num_processes: int
    threads: int  # of each process
    samples_per_pass: int  # responses in one forward and backward pass of one process
    generation: str  # generate: model.generate; continuous: generate_batch, paged
    lr: float


class Clock(TrainerCallback):
    """Says when a step ends; seconds per phase of each."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.responses: list[tuple[int, int]] = []  # (responses, response tokens) of each step
        self.metrics: dict[str, list[float]] = {}  # the trainer's own: it drops them when it ends
        self.trainer: Any = None

    def timed(self, phase: str, method: Any) -> Any:
        """`method`, its seconds added to `phase`."""

        @wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.phases[phase] += time.perf_counter() - start

        return wrapper

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(dict(self.phases))
        self.phases.clear()
        self.metrics = {name: list(v) for name, v in self.trainer._metrics["train"].items()}
        if state.is_world_process_zero:
            print(f"{state.global_step}/{state.max_steps} steps", flush=True)


def make_reward(clock: Clock, eos_token_id: int) -> Any:
    """The reward of the other side by text alone: last box in the answers; truncated counts 0."""

    def reward(
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answers: list[list[str]],
        **_: Any,
    ) -> list[float]:
        clock.responses.append((len(completion_ids), sum(map(len, completion_ids))))
        rewards = []
        for text, ids, gold in zip(completions, completion_ids, answers, strict=True):
            boxes = _BOXED.findall(text)
            correct = bool(boxes) and ids[-1] == eos_token_id and boxes[-1] in gold
            rewards.append(float(correct))
        return rewards

    return reward


def trainer_config(job: Job, folder: Path) -> GRPOConfig:
    """Dr. GRPO, on-policy, one optimizer step per rollout; nothing is saved, logged or evaluated.

    TRL's defaults that would slow it down here are off: gradient checkpointing, bf16 autocast.
    """
    num_responses = job.num_prompts * job.group_size
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=job.num_steps,
        per_device_train_batch_size=job.samples_per_pass,
        gradient_accumulation_steps=num_responses // (job.num_processes * job.samples_per_pass),
        num_generations=job.group_size,
        max_completion_length=job.max_response_tokens,
        temperature=1.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        use_transformers_continuous_batching=job.generation == "continuous",
        transformers_continuous_batching_config=_CONTINUOUS,
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def run(job: Job) -> dict[str, Any]:
    """Train for `job.num_steps`; what was measured on this rank."""
    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rows = [json.loads(line) for line in Path(job.prompts).read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": r["problem"], "answers": r["answers"]} for r in rows])
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=make_reward(clock, tokenizer.eos_token_id),
        args=trainer_config(job, Path(job.output).parent / "trl_output"),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer._generate = clock.timed("rollout_s", trainer._generate)
    trainer._calculate_rewards = clock.timed("reward_s", trainer._calculate_rewards)
    trainer.train()
    return {
        "steps": clock.steps,
        "responses": [count for count, _ in clock.responses],
        "tokens": [tokens for _, tokens in clock.responses],
        "reward_mean": clock.metrics["reward"],
        "no_signal_frac": clock.metrics["frac_reward_zero_std"],
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": str(trainer.args.optim),
        "attention": str(model.config._attn_implementation),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "trl", "transformers", "accelerate")
        }
        | {"python": sys.version.split()[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    job = Job(**json.loads(parser.parse_args().job.read_text()))
    report = run(job)
    rank = int(os.environ.get("RANK", "0"))
    if torch.distributed.is_initialized():
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        for name in ("responses", "tokens"):  # of all processes; times are the first one's
            report[name] = [sum(values) for values in zip(*(r[name] for r in reports), strict=True)]
    if rank == 0:
        Path(job.output).write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
