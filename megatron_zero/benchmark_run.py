"""A model on benchmarks, greedy and sampled, under one or all templates: one rank of the job.

Every rank has an engine, or a part of one, and takes its share of the prompts. Responses are
written after every `--save-every` of them, and the same command goes on where an earlier one ended:
what was not written is drawn again, in the same batches with the same seeds.

    DIR/settings.json       what decides the numbers; a folder is only continued under the same
    DIR/<template>.jsonl    every response with its verdict (`evaluate`)
    DIR/<template>.json     every metric with its interval (`evaluate.summarize`)
    DIR/table.md            the table that is printed
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_zero import evaluate
from megatron_zero.benchmark_tables import table
from megatron_zero.config import TEMPLATES, EvaluationConfig, RunConfig, fail, replace
from megatron_zero.config_io import flatten
from megatron_zero.convert.hf_dir import fingerprint, local_directory, read_config
from megatron_zero.convert.stored import folder_corrections
from megatron_zero.data.encoding import load_tokenizer
from megatron_zero.data.prompts import prompts_digest
from megatron_zero.data.stop_tokens import (
    check_responses_can_end,
    describe_stop_tokens,
    stop_token_ids,
)
from megatron_zero.data.templates import stop_strings
from megatron_zero.failures import user_errors
from megatron_zero.grading import Grader, verifier_pool
from megatron_zero.hf_config import num_positions
from megatron_zero.launch_args import progress
from megatron_zero.model_files import check_token_ids, check_weights_for_engine
from megatron_zero.observability.environment import package_versions
from megatron_zero.observability.run_dir import write_atomically
from megatron_zero.rollout.sampler import Sampler, merged
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import Prompt


class BenchmarkRun:
    """A model, what it is asked under which template, and the engine, which starts when needed."""

    def __init__(self, config: RunConfig, every_template: bool, save_every: int) -> None:
        """Join the job; collective, as all methods are."""
        progress("joining the other processes; prompts")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.config, self.save_every = config, save_every
        self.group = dist.new_group(backend="gloo")
        self.plan: dict[str, tuple[RunConfig, list[Prompt]]] = {}
        with user_errors():
            self.directory = local_directory(config.model.path, "model.path", self.group)
            check_weights_for_engine(config.model, read_config(self.directory), self.directory)
            tokenizer = load_tokenizer(config.model)
            written = read_config(self.directory)
            if self.group.rank() == 0:  # the engine finds out by itself; its words are dropped
                for note in folder_corrections(written, self.directory).notes:
                    print(f"note: {note}", flush=True)
            hf_config = AutoConfig.from_pretrained(self.directory, trust_remote_code=False)
            self.stop_ids = stop_token_ids(config.model, tokenizer, self.directory)
            length = {"max_position_embeddings": hf_config.max_position_embeddings}
            longest, _ = num_positions(written | length)
            possible = [t for t in TEMPLATES if t != "llama_instruct" or tokenizer.chat_template]
            for name in possible if every_template else [config.data.template]:
                each = replace(config, data=replace(config.data, template=name))
                prompts = evaluate.evaluation_prompts(each, longest, tokenizer)
                check_token_ids(config.model, hf_config.vocab_size, prompts)
                check_responses_can_end(self.stop_ids, stop_strings(name), config.model)
                self.plan[name] = each, prompts
        if self.group.rank() == 0:
            print(f"stop tokens: {describe_stop_tokens(self.stop_ids, tokenizer)}", flush=True)
        self.prompts = [prompt for _, prompts in self.plan.values() for prompt in prompts]
        self.max_model_len = evaluate.max_model_len(config, self.prompts, longest)
        self.settings = flatten(config) | {"templates": [*self.plan], "save_every": save_every}
        self.settings |= {"weights": fingerprint(self.directory), "versions": package_versions()}
        self.settings |= {"stop_token_ids": list(self.stop_ids)}
        self.settings |= {"prompts": prompts_digest(self.prompts), "world_size": self.group.size()}

    @cached_property
    def sampler(self) -> Sampler:
        """The engine with the model's weights."""
        progress("rollout engine")
        engine = VllmEngine(
            str(self.directory),
            self.config.rollout,
            tokenizer=self.config.model.tokenizer or str(self.directory),
            stop_token_ids=self.stop_ids,
            dtype=self.config.model.dtype,
            max_model_len=self.max_model_len,
            rank=self.group.rank(),
            world_size=self.group.size(),
            from_disk=True,
        )
        return Sampler(engine, self.group)

    def run(self, out: Path) -> None:
        """Evaluate into `out`, from where an earlier run in it ended."""
        if is_first := self.group.rank() == 0:
            with user_errors():
                lock = begin(out, self.settings)
        results = {}
        for template, (config, prompts) in self.plan.items():
            path, settings = out / f"{template}.jsonl", self.settings | {"data.template": template}
            with verifier_pool(config) as pool:
                parts = self.sampler, Grader(pool, self.group)
                draw(config, prompts, parts, path, self.save_every)
            if is_first:
                lines = path.read_bytes().decode(errors="surrogatepass").split("\n")[:-1]
                results[template] = evaluate.summarize(map(json.loads, lines))
                data = evaluate.results_json(results[template], settings)
                write_atomically(path.with_suffix(".json"), data)
        if is_first:
            drawn = table(results) + described(self.config.evaluation)
            write_atomically(out / "table.md", drawn.encode())
            print(f"\n{drawn}\n{out}", flush=True)
            lock.close()


def described(evaluation: EvaluationConfig) -> str:
    """A line that says how samples were drawn; nothing where there are none."""
    if not evaluation.temperature:
        return ""
    names = ("num_samples", "temperature", "top_p", "top_k")
    return f"sampled: {', '.join(f'{name} {getattr(evaluation, name)}' for name in names)}\n"


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
    before = json.loads(path.read_text())
    for name, now in json.loads(text).items():
        if before.get(name) != now:
            fail(name, now, f"{out} was begun with {before.get(name)!r}: take another --out")
    return lock


def draw(
    config: RunConfig,
    prompts: Sequence[Prompt],
    parts: tuple[Sampler, Grader],
    path: Path,
    save_every: int,
) -> None:
    """Write the records of every prompt to `path`, after those that are there; collective."""
    sampled, group = config.evaluation, parts[0].host_group
    greedy = replace(sampled, num_samples=1, temperature=0.0, top_p=1.0, top_k=0)
    modes = {"greedy": replace(config, evaluation=greedy)}
    if sampled.temperature:
        modes["sampled"] = config
    batches, ends = [], [0]
    for mode, each in modes.items():
        n = each.evaluation.num_samples
        size = max(1, save_every // n)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            said = f"{path.stem}, {mode}: {start + len(batch)} of {len(prompts)} problems"
            batches.append((each, batch, said))
            ends.append(ends[-1] + n * len(batch))
    num_done = merged({0: resume(path, ends)} if group.rank() == 0 else {}, group)[0]
    if num_done < len(batches):
        progress(f"{path.stem}: {ends[-1] - ends[num_done]} responses to {len(prompts)} problems")
    for number, (each, batch, said) in enumerate(batches[num_done:], num_done + 1):
        records = evaluate.evaluate(each, batch, *parts, 0)
        if group.rank() == 0:
            with path.open("ab") as file:
                file.write(evaluate.to_jsonl(records))
                os.fsync(file.fileno())
            print(f"{said}, {ends[number]} of {ends[-1]} responses", flush=True)


def resume(path: Path, ends: Sequence[int]) -> int:
    """How many batches are on disk whole, when they end at so many lines; the rest is cut off.

    Example:
        resume(path, [0, 3, 6]) == 1 where there are 5 lines: 2 are cut off
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    num_done = sum(end <= len(lines) for end in ends) - 1
    with path.open("ab") as file:
        file.truncate(sum(len(line) + 1 for line in lines[: ends[num_done]]))
    return num_done
