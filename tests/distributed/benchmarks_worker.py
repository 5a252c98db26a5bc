"""Under torchrun: end an evaluation that was killed, do the whole of it, then in one batch.

Besides, samples of the likeliest tokens alone, to NARROW.json: setting -> outputs.

benchmarks_worker.py CONTINUED_DIR WHOLE_DIR AT_ONCE.jsonl NARROW.json <command line's arguments>
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from megatron_zero import evaluate
from megatron_zero.benchmark_run import BenchmarkRun
from megatron_zero.checks import UserError
from megatron_zero.config_io import apply_overrides
from megatron_zero.convert.safetensors_io import SINGLE_NAME
from megatron_zero.eval import parse_args
from megatron_zero.grading import Grader, verifier_pool
from megatron_zero.rollout.vllm_engine import CHECKED_FORMAT


def refusal_of_nan(directory: Path) -> str:
    """What the way in which the engine loads weights says of a copy with one NaN."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    with tempfile.TemporaryDirectory() as damaged:
        tensors = load_file(directory / SINGLE_NAME)
        tensors["model.norm.weight"][3] = math.nan
        save_file(tensors, Path(damaged) / SINGLE_NAME, metadata={"format": "pt"})
        loader = get_model_loader(LoadConfig(load_format=CHECKED_FORMAT))
        model = SimpleNamespace(model=damaged, revision=None)
        try:
            list(loader.get_all_weights(model, torch.nn.Module()))
        except UserError as error:
            return str(error).removeprefix(damaged)
    return ""


def main() -> None:
    continued, whole, at_once, narrow = map(Path, sys.argv[1:5])
    args, config = parse_args(sys.argv[5:])
    job = BenchmarkRun(config, False, args.save_every)
    job.run(continued)
    job.run(whole)
    engine = job.sampler.engine
    assert engine._llm.llm_engine.vllm_config.load_config.load_format == CHECKED_FORMAT
    with verifier_pool(config) as pool:
        grader = Grader(pool, job.group)
        # more tokens than the engine reads at once, where the batches before had few
        records = evaluate.evaluate(config, job.prompts, job.sampler, grader, 0)
        outputs = {}
        for setting in ("top_k=1", "top_p=1e-6", "top_k=4", "top_p=0.0005"):
            changed = apply_overrides(config, [f"evaluation.{setting}"])
            drawn = evaluate.evaluate(changed, job.prompts[:2], job.sampler, grader, 0)
            outputs[setting] = [record["output"] for record in drawn]
    print("DAMAGED", refusal_of_nan(job.directory), flush=True)
    if job.group.rank() == 0:
        narrow.write_text(json.dumps(outputs))
        at_once.write_bytes(evaluate.to_jsonl(records))


if __name__ == "__main__":
    main()
