"""The learning rate of every optimizer step, from Megatron's scheduler as the policy uses it."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_zero.config import OptimizerConfig
from megatron_zero.policy.optimizer import build_scheduler

NUM_STEPS = 12
LR, MIN_LR = 3e-4, 1e-5


def rates(
    config: OptimizerConfig, stop: int, *, saved: "dict | None" = None
) -> "tuple[list[float], dict]":
    """Of the steps up to `stop`, from `saved` on if given, and what a checkpoint keeps then."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = build_scheduler(config, optimizer, num_optimizer_steps=NUM_STEPS)
    if saved is not None:
        scheduler.load_state_dict(saved)
    found = []
    while scheduler.num_steps < stop:
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found, scheduler.state_dict()


def expected(schedule: str, warmup_steps: int) -> list[float]:
    """The definition: lr k / w in warm-up step k of w; then the decay, from lr on."""
    found = []
    for step in range(1, NUM_STEPS + 1):
        if step <= warmup_steps:
            found.append(LR * step / warmup_steps)
            continue
        last = max(warmup_steps, 1)  # the step that has lr
        done = (step - last) / (NUM_STEPS + 1 - last)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        low = LR if schedule == "constant" else MIN_LR
        found.append(low + (LR - low) * left[schedule])
    return found


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_every_step(schedule) -> None:
    config = OptimizerConfig(lr=LR, min_lr=MIN_LR, lr_schedule=schedule)
    for warmup_steps in (0, 1, 2, 5, NUM_STEPS):
        warm = replace(config, warmup_steps=warmup_steps)
        whole, _ = rates(warm, NUM_STEPS)
        assert whole == pytest.approx(expected(schedule, warmup_steps), rel=1e-12)
        assert min(whole) > 0  # a step that learns nothing is none
        if warmup_steps:
            assert whole[0] == pytest.approx(LR / warmup_steps, rel=1e-15)
            assert whole[warmup_steps - 1] == pytest.approx(LR, rel=1e-15)
        for resumed_at in (1, 4, 5, 6, 11):
            _, state = rates(warm, resumed_at)
            rest, _ = rates(warm, NUM_STEPS, saved=state)
            assert rest == whole[resumed_at:]


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    config = OptimizerConfig(lr=LR, lr_schedule="linear", warmup_steps=100)
    assert rates(config, 3)[0] == pytest.approx([LR / 100, 2 * LR / 100, 3 * LR / 100])
