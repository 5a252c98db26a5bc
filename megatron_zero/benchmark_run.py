"""A model on benchmarks, greedy and sampled, under one or all templates: one rank of the job.

Every rank has an engine, or a part of one, and takes its share of the prompts. Responses are
written after every `--save-every` of them, and the same command goes on where an earlier one ended:
what was not written is drawn again, in the same batches with the same seeds.

    DIR/settings.json       what decides the numbers; a folder is only continued under the same
    DIR/<template>.jsonl    every response with its verdict (`evaluate`)
    DIR/<template>.json     every metric with its interval (`evaluate.summarize`)
    DIR/table.md            the table that is printed
"""

import argparse
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_zero import evaluate
from megatron_zero.benchmark_tables import table
from megatron_zero.config import TEMPLATES, RunConfig, fail, replace
from megatron_zero.config_io import flatten
from megatron_zero.convert.hf_dir import fingerprint, job_directory
from megatron_zero.data.encoding import load_tokenizer
from megatron_zero.data.prompts import prompts_digest
from megatron_zero.grading import Grader, verifier_pool
from megatron_zero.launch_args import user_errors
from megatron_zero.observability.environment import package_versions
from megatron_zero.observability.run_dir import write_atomically
from megatron_zero.rollout.sampler import Sampler, merged
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import Prompt

DECISIVE = ("seed", "model.", "data.", "rollout.", "reward.", "evaluation.")


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Evaluate under every template that is asked for; collective."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = dist.new_group(backend="gloo")
    with user_errors():
        directory = job_directory(config.model.path, "model.path", group)
        num_positions = AutoConfig.from_pretrained(directory).max_position_embeddings
        plan = plan_templates(config, num_positions, every=args.sweep_templates)
        settings = {path: v for path, v in flatten(config).items() if path.startswith(DECISIVE)}
        settings |= {"save_every": args.save_every, "world_size": group.size()}
        settings |= {"weights": fingerprint(directory), "versions": package_versions()}
        settings |= {"prompts": {t: prompts_digest(prompts) for t, (_, prompts) in plan.items()}}
        lock = begin(args.out, settings) if group.rank() == 0 else None
    every_prompt = [prompt for _, prompts in plan.values() for prompt in prompts]
    engine = VllmEngine(
        str(directory),
        config.rollout,
        tokenizer=config.model.tokenizer or str(directory),
        dtype=config.model.dtype,
        max_model_len=evaluate.max_model_len(config, every_prompt, num_positions),
        rank=group.rank(),
        world_size=group.size(),
        from_disk=True,
    )
    results = {}
    for template, (each, prompts) in plan.items():
        path = args.out / f"{template}.jsonl"
        with verifier_pool(each) as pool:
            parts = Sampler(engine, group), Grader(pool, group)
            draw(each, prompts, *parts, path, args.save_every)
        if lock:
            lines = path.read_bytes().decode(errors="surrogatepass").split("\n")[:-1]
            results[template] = evaluate.summarize(map(json.loads, lines))
            data = evaluate.results_json(results[template], settings | {"data.template": template})
            write_atomically(path.with_suffix(".json"), data)
    if lock:
        write_atomically(args.out / "table.md", table(results).encode())
        print(f"\n{table(results)}\n{args.out}", flush=True)


def plan_templates(
    config: RunConfig, num_positions: int, *, every: bool
) -> dict[str, tuple[RunConfig, list[Prompt]]]:
    """Settings and prompts of the template; of `every` one, where the tokenizer can do it."""
    tokenizer = load_tokenizer(config.model)
    names = [config.data.template]
    if every:
        has_chat = getattr(tokenizer, "chat_template", None) is not None
        names = [name for name in TEMPLATES if has_chat or name != "llama_instruct"]
    configs = {name: replace(config, data=replace(config.data, template=name)) for name in names}
    return {
        name: (each, evaluate.evaluation_prompts(each, num_positions, tokenizer))
        for name, each in configs.items()
    }


def begin(out: Path, settings: Mapping[str, Any]) -> TextIO:
    """Make the folder, or check that what is there was begun alike; the lock on it.

    Raises:
        ValueError: other settings, or another process at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail("--out", str(out), "another evaluation is at work there")
    path, text = out / "settings.json", json.dumps(settings, indent=1) + "\n"
    if not path.exists():
        write_atomically(path, text.encode())
    before, now = json.loads(path.read_text()), json.loads(text)
    for name in before | now:
        if before.get(name) != now.get(name):
            valid = f"{out} was begun with {before.get(name)!r}: take another --out"
            fail(name, now.get(name), valid)
    return lock


def draw(
    config: RunConfig,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    grader: Grader,
    path: Path,
    save_every: int,
) -> None:
    """Write the records of every prompt to `path`, after those that are there; collective."""
    group, sampled = grader.host_group, config.evaluation
    greedy = replace(config, evaluation=replace(sampled, num_samples=1, temperature=0.0))
    batches = [
        (each, prompts[start : start + size])
        for each in ([greedy, config] if sampled.temperature else [greedy])
        for size in [max(1, save_every // each.evaluation.num_samples)]
        for start in range(0, len(prompts), size)
    ]
    ends = list(accumulate(each.evaluation.num_samples * len(batch) for each, batch in batches))
    num_done = merged({0: resume(path, ends)} if group.rank() == 0 else {}, group)[0]
    for (each, batch), end in list(zip(batches, ends, strict=True))[num_done:]:
        records = evaluate.evaluate(each, batch, sampler, grader, 0)
        if group.rank() == 0:
            with path.open("ab") as file:
                file.write(evaluate.to_jsonl(records))
                os.fsync(file.fileno())
            print(f"{path.stem}: {end} of {ends[-1]} responses", flush=True)


def resume(path: Path, ends: Sequence[int]) -> int:
    """How many batches are on disk whole, when they end at so many lines; the rest is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    num_done = sum(end <= len(lines) for end in ends)
    os.truncate(path, sum(len(line) + 1 for line in lines[: [0, *ends][num_done]]))
    return num_done
