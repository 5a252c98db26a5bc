"""Runs for two CPU cores: the whole machine at a scale that can be watched."""

from megatron_zero.config import (
    ArchitectureConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DocumentsConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RolloutConfig,
    RunConfig,
)

_TINY = ArchitectureConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def quickstart_base() -> PretrainConfig:
    """A base model of 0.8 M parameters that adds two-digit numbers, and is wrong half the time.

    Its documents work the sum out step by step and then state a wrong answer half the time: what a
    base model is before RL, able but careless.
    """
    return PretrainConfig(
        name="quickstart_base",
        num_steps=500,
        model=ModelConfig(init="random", architecture=_TINY, tokenizer="characters", dtype="fp32"),
        documents=DocumentsConfig(source="arithmetic", sequence_length=512, sequences_per_step=4),
        max_tokens_per_microbatch=2048,
        optimizer=OptimizerConfig(lr=3e-3, min_lr=2e-4, lr_schedule="cosine", warmup_steps=10),
        checkpoint=CheckpointConfig(save_hf=True),
        logging=LoggingConfig(tensorboard=False),
    )


def quickstart() -> RunConfig:
    """Dr. GRPO on the base model of `quickstart_base`, in a few minutes on two cores."""
    return RunConfig(
        name="quickstart",
        num_steps=80,
        model=ModelConfig(path="runs/quickstart_base/hf/step_000500", dtype="fp32"),
        data=DataConfig(dataset="arithmetic", template="arithmetic", max_prompt_tokens=32),
        rollout=RolloutConfig(
            num_prompts_per_step=32, group_size=8, max_response_tokens=96, kv_cache_gib=0.25
        ),
        batch=BatchConfig(global_batch_size=256, max_tokens_per_microbatch=8192),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_schedule="linear", warmup_steps=5),
        evaluation=EvaluationConfig(
            datasets=["arithmetic_heldout"], every_num_steps=20, num_samples=2, temperature=1.0
        ),
        logging=LoggingConfig(rollouts_every_num_steps=20),
    )


def math_smoke() -> RunConfig:
    """Real problems, the real Qwen2.5 vocabulary, a small random model: does every part work?

    Needs two paths: `model.tokenizer=` (a Qwen2.5 tokenizer) and `data.data_dir=` (see
    `megatron_zero/data/datasets.py`); nothing is learned in its few steps.
    """
    return RunConfig(
        name="math_smoke",
        num_steps=3,
        model=ModelConfig(
            init="random",
            architecture=ArchitectureConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=151936,
            ),
            tokenizer="Qwen/Qwen2.5-Math-1.5B",
            dtype="fp32",
        ),
        data=DataConfig(dataset="math_lvl3to5_8k", template="qwen_math", max_prompt_tokens=256),
        rollout=RolloutConfig(num_prompts_per_step=4, group_size=4, max_response_tokens=32),
        batch=BatchConfig(
            global_batch_size=16, max_tokens_per_microbatch=1024, skip_zero_advantage=False
        ),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        evaluation=EvaluationConfig(datasets=[]),
    )
