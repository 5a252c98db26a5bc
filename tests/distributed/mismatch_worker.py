"""Under torchrun: two RL steps of each case, one run after the other in the same processes.

mismatch_worker.py DIRECTORY ENGINE_TP CASE...

A case is words of `tests.layouts.parallel_of` and last a family, whose HF checkpoint is
DIRECTORY/FAMILY. The run is `train` itself with the real engine; it leaves
DIRECTORY/runs/CASE/metrics.jsonl.
"""

import gc
import sys
from pathlib import Path

from megatron_zero.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_zero.train import train
from tests.layouts import parallel_of


def run_config(case: str, directory: Path, engine_tp: int) -> RunConfig:
    """Every sample is trained on, whatever its reward, and the weights move far in a step."""
    *words, family = case.split("-")
    return RunConfig(
        name=case,
        num_steps=2,
        runs_dir=str(directory / "runs"),
        model=ModelConfig(path=str(directory / family), dtype="fp32"),
        data=DataConfig(dataset="arithmetic", template="arithmetic", max_prompt_tokens=32),
        rollout=RolloutConfig(
            num_prompts_per_step=4,
            group_size=4,
            max_response_tokens=24,
            tensor_model_parallel_size=engine_tp,
            kv_cache_gib=0.05,
        ),
        loss=LossConfig(entropy_coef=0.5),
        batch=BatchConfig(
            global_batch_size=16, max_tokens_per_microbatch=512, skip_zero_advantage=False
        ),
        parallel=parallel_of(words),
        optimizer=OptimizerConfig(lr=1e-2),
        evaluation=EvaluationConfig(datasets=[]),
        checkpoint=CheckpointConfig(save_hf=False),
        logging=LoggingConfig(console=False, tensorboard=False, rollouts_every_num_steps=0),
    )


def main() -> None:
    directory, engine_tp, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for case in cases:
        train(run_config(case, directory, engine_tp))
        gc.collect()  # the engine is part of cycles, and ends the process group with itself


if __name__ == "__main__":
    main()
