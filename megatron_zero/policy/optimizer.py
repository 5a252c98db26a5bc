"""Adam with float32 master weights, sharded over data parallelism, and its learning-rate schedule.

Megatron picks the fused Adam of Transformer Engine or apex where one is installed and torch's
AdamW otherwise; `adam_implementation` says which.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_zero.checks import fail
from megatron_zero.config import OptimizerConfig, ParallelConfig
from megatron_zero.policy.model import layer_implementation

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}  # as Megatron has it


def wrap_model(
    config: TransformerConfig,
    model: torch.nn.Module,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
) -> DistributedDataParallel:
    """A chunk with gradient buffers that are summed over data parallelism.

    In float32, or in float64 with such a model; in bfloat16 where the optimizer's setting says so.
    """
    is_bf16 = config.params_dtype == torch.bfloat16
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=is_bf16 and optimizer.main_grads_dtype == "fp32",
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return DistributedDataParallel(config, ddp_config, model)


def build_optimizer(
    config: OptimizerConfig,
    parallel: ParallelConfig,
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    num_optimizer_steps: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Optimizer and schedule; norms and biases are not decayed (reference A5).

    Args:
        num_optimizer_steps: of the whole run; where a decaying schedule ends.

    Raises:
        ValueError: the settings need an Adam that is not installed.
    """
    if config.reduced_dtypes and layer_implementation() != "transformer_engine":
        name, value = next(iter(config.reduced_dtypes.items()))
        fail(f"optimizer.{name}", value, "must be fp32 without Transformer Engine's Adam")
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        use_precision_aware_optimizer=bool(config.reduced_dtypes),
        **{name: DTYPES[value] for name, value in config.reduced_dtypes.items()},
    )
    overrides = get_standard_config_overrides(megatron_config)
    optimizer = get_megatron_optimizer(megatron_config, list(chunks), config_overrides=overrides)
    scheduler = build_scheduler(config, optimizer, num_optimizer_steps=num_optimizer_steps)
    return optimizer, scheduler


def build_scheduler(
    config: OptimizerConfig,
    optimizer: MegatronOptimizer | torch.optim.Optimizer,
    *,
    num_optimizer_steps: int,
) -> OptimizerParamScheduler:
    """The learning rate of every step, and which parameters are decayed.

    Of w warm-up steps the first has lr / w and the last has lr; the decay begins with the step
    after it, so that one warm-up step is the same as none. It would reach `min_lr` one step after
    the run's last.

    Example (lr 1, linear, 4 warm-up steps, 7 in all):
        1/4, 2/4, 3/4, 1, 3/4, 2/4, 1/4
    """
    # Megatron's ramp has `init_lr` at step 0, so that the first of w steps would do nothing, and
    # `max_lr` at step `lr_warmup_steps`; the last of w steps is step w - 1.
    num_warmup_steps = max(config.warmup_steps, 1)
    # Without this scheduler Megatron would decay norms and biases too: it alone applies wd_mult.
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / num_warmup_steps,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=num_warmup_steps - 1,
        lr_decay_steps=max(num_optimizer_steps, num_warmup_steps),
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(num_optimizer_steps, 1),
        wd_incr_style="constant",
        # A resumed run goes on at the checkpoint's step of the schedule that its own settings say.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The torch, apex or TE optimizers at the bottom of Megatron's wrappers."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained]


def adam_implementation(optimizer: MegatronOptimizer) -> str:
    """For the start-up report, e.g. `torch.optim.adamw.AdamW`."""
    kinds = {f"{type(o).__module__}.{type(o).__qualname__}" for o in inner_optimizers(optimizer)}
    return ", ".join(sorted(kinds))


def current_lr(optimizer: MegatronOptimizer) -> float:
    """Learning rate of the next optimizer step."""
    return float(inner_optimizers(optimizer)[0].param_groups[0]["lr"])
