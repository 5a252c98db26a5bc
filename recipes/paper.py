"""The paper's runs (arXiv 2503.20783): Qwen2.5-Math on MATH with Dr. GRPO, 8 x A100, 27 hours.

Numbers are those of the published recipe; what differs is named where it does. Both ablations of
the paper are two overrides away: `advantage.normalize_std=true` and
`loss.length_normalizer=response`, together GRPO.
"""

from megatron_zero.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)

BENCHMARKS = ["aime", "amc", "math", "minerva", "olympiad_bench"]


def _qwen2_5_math(*, name: str, path: str, dataset: str, num_steps: int) -> RunConfig:
    return RunConfig(
        name=name,
        num_steps=num_steps,
        model=ModelConfig(path=path, dtype="bf16"),
        data=DataConfig(dataset=dataset, template="qwen_math", max_prompt_tokens=1024),
        rollout=RolloutConfig(
            num_prompts_per_step=128,
            group_size=8,
            max_response_tokens=3000,
            temperature=1.0,
            gpu_memory_utilization=0.35,
        ),
        # 1024 responses in 8 optimizer steps, all on one set of old logprobs.
        batch=BatchConfig(global_batch_size=128, max_tokens_per_microbatch=16384),
        parallel=ParallelConfig(tensor_model_parallel_size=1, recompute="full"),
        # The published "constant" schedule has no warm-up, whatever its warm-up ratio says.
        optimizer=OptimizerConfig(
            lr=1e-6, lr_schedule="constant", beta1=0.9, beta2=0.95, weight_decay=0.0, clip_grad=1.0
        ),
        evaluation=EvaluationConfig(datasets=BENCHMARKS, every_num_steps=16, temperature=0.0),
        # The published script saves nothing at all; a 27-hour run should leave a model behind.
        checkpoint=CheckpointConfig(every_num_steps=16, keep=2, save_hf=True),
        logging=LoggingConfig(rollouts_every_num_steps=16),
    )


def qwen2_5_math_1_5b() -> RunConfig:
    """Qwen2.5-Math-1.5B on the 12,000 MATH problems; 20 epochs of prompts are 1,875 steps."""
    return _qwen2_5_math(
        name="qwen2_5_math_1_5b", path="Qwen/Qwen2.5-Math-1.5B", dataset="math_12k", num_steps=1875
    )


def qwen2_5_math_7b() -> RunConfig:
    """Qwen2.5-Math-7B on MATH levels 3 to 5: the headline run; 20 epochs are 1,331 steps.

    Tensor parallelism of 2 leaves a 40 GiB A100 room for the optimizer's shard beside the engine.
    """
    config = _qwen2_5_math(
        name="qwen2_5_math_7b",
        path="Qwen/Qwen2.5-Math-7B",
        dataset="math_lvl3to5_8k",
        num_steps=1331,
    )
    return _with_tensor_parallel(config, 2)


def _with_tensor_parallel(config: RunConfig, tp_size: int) -> RunConfig:
    from megatron_zero.config import replace

    parallel = replace(
        config.parallel, tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1
    )
    return replace(config, parallel=parallel)
