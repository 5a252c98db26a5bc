"""Under torchrun: runs are begun from models, and their policies exported as they are.

stored_worker.py RUNS_DIR ENGINE_MODEL MODEL...

Every MODEL, a folder in either format, becomes the run RUNS_DIR/<its name>, with an export as
after one step. At last the engine starts from the files of ENGINE_MODEL, as an evaluation does, and
writes what it drew to RUNS_DIR/drawn.json: rows of token ids and their logprobs.
"""

import json
import sys
from pathlib import Path

from megatron_zero import build
from megatron_zero.config import DocumentsConfig, ModelConfig, PretrainConfig, RolloutConfig
from megatron_zero.losses import next_token_objective
from megatron_zero.rollout.engine import Request, SamplingSettings
from megatron_zero.rollout.vllm_engine import VllmEngine

PROMPT = tuple(range(3, 20))  # longer than the original length of the model with YaRN


def begin_and_export(runs_dir: Path, model: Path) -> None:
    config = PretrainConfig(
        name=model.name,
        runs_dir=str(runs_dir),
        model=ModelConfig(path=str(model), tokenizer="characters", dtype="fp32"),
        documents=DocumentsConfig(sequence_length=32),
    )
    topology, run_dir, _, hf_config, _ = build.start_run(config, resume=False)
    policy = build.build_policy(
        config, hf_config, topology, objective=next_token_objective, num_optimizer_steps=1
    )
    build.export_hf(policy, run_dir, 1, bucket_bytes=1 << 20)


def drawn_from_disk(model: Path) -> list[list[list[float]]]:
    engine = VllmEngine(
        str(model),
        RolloutConfig(kv_cache_gib=0.05),
        tokenizer=str(model),
        stop_token_ids=[1],  # of the character tokenizer
        dtype="fp32",
        max_model_len=64,
        rank=0,
        world_size=1,
        from_disk=True,
    )
    requests = [Request(prompt_token_ids=PROMPT[i:], seed=i) for i in range(4)]
    responses = engine.generate(requests, SamplingSettings(max_tokens=40, temperature=1.0))
    return [[list(r.token_ids), list(r.rollout_logprobs)] for r in responses]


def main() -> None:
    runs_dir, engine_model, *models = map(Path, sys.argv[1:])
    for model in models:
        begin_and_export(runs_dir, model)
    (runs_dir / "drawn.json").write_text(json.dumps(drawn_from_disk(engine_model)))


if __name__ == "__main__":
    main()
