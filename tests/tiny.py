"""A tiny Qwen2 and a ragged rollout on it, the same in every process that asks."""

import random
from pathlib import Path
from typing import Any

from megatron_zero.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.types import TrainSample

SHARED = Path(__file__).resolve().parents[2] / "shared"  # data that is no part of the project
MAX_PROMPT, MAX_RESPONSE = 10, 40
NUM_SAMPLES = 32


def hf_config(*, tied: bool, vocab_size: int = 131, **changes: Any) -> dict[str, Any]:
    """131 tokens: divided by no number of ranks, so the vocabulary is padded."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 128,  # heads of 32: the smallest that vLLM has on a CPU
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "initializer_range": 0.05,
        "hidden_act": "silu",
        **changes,
    }


def run_config(
    *, global_batch_size: int = NUM_SAMPLES, max_tokens: int = 100, loss: "LossConfig | None" = None
) -> RunConfig:
    """The configuration that `samples` belong to."""
    return RunConfig(
        name="test",
        model=ModelConfig(path="unused", dtype="fp32"),
        data=DataConfig(max_prompt_tokens=MAX_PROMPT),
        rollout=RolloutConfig(
            num_prompts_per_step=NUM_SAMPLES // 4, group_size=4, max_response_tokens=MAX_RESPONSE
        ),
        loss=loss or LossConfig(),
        batch=BatchConfig(
            global_batch_size=global_batch_size,
            max_tokens_per_microbatch=max_tokens,
            skip_zero_advantage=False,
        ),
    )


def samples(kind: str = "tiny") -> list[TrainSample]:
    """Ragged samples with advantages of both signs: `tiny`, the same `reversed`, `math`, `long`."""
    if kind == "math":
        return math_samples()
    if kind == "long":
        return long_samples()
    return _made_samples()[:: -1 if kind == "reversed" else 1]


def math_samples() -> list[TrainSample]:
    """Real MATH problems in their template; the responses begin like other problems, ragged.

    Needs the shared data. The real tokenizer's ids are folded into the tiny vocabulary.
    """
    from transformers import AutoTokenizer

    from megatron_zero.data.datasets import load_rows
    from megatron_zero.data.templates import apply_template

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen2.5")
    rows = load_rows(DataConfig(dataset="math_lvl3to5_8k", data_dir=str(SHARED / "data")))
    rng = random.Random(0)
    made = []
    for row, other in zip(rows[:NUM_SAMPLES], rows[NUM_SAMPLES : 2 * NUM_SAMPLES], strict=True):
        prompt = tokenizer(apply_template("qwen_math", row.question))["input_ids"]
        response = tokenizer(other.question)["input_ids"][: rng.randint(5, MAX_RESPONSE)]
        made.append(
            TrainSample(
                token_ids=tuple(token % 131 for token in prompt + response),
                prompt_length=len(prompt),
                rollout_logprobs=tuple(-5 * rng.random() for _ in response),
                advantage=rng.choice([-0.25, 0.0, 0.75]),
            )
        )
    return made


def long_samples() -> list[TrainSample]:
    """The first two samples, and one with a response of 8,192 tokens."""
    rng = random.Random(1)
    response = tuple(rng.randrange(3, 131) for _ in range(8192))
    long = TrainSample(
        token_ids=(7, 8, 9, *response),
        prompt_length=3,
        rollout_logprobs=(-4.9,) * len(response),
        advantage=0.75,
    )
    return [*_made_samples()[:2], long]


def _made_samples() -> list[TrainSample]:
    rng = random.Random(0)
    made = []
    for _ in range(NUM_SAMPLES):
        prompt, response = rng.randint(1, MAX_PROMPT), rng.randint(1, MAX_RESPONSE)
        made.append(
            TrainSample(
                token_ids=tuple(rng.randrange(131) for _ in range(prompt + response)),
                prompt_length=prompt,
                rollout_logprobs=tuple(-5 * rng.random() for _ in range(response)),
                advantage=rng.choice([-0.25, 0.0, 0.75]),
            )
        )
    return made
