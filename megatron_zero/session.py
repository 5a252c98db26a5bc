"""One run's parts, built in order, and what a loop does besides its verbs: log, evaluate, save.

with Session(config, resume=False) as run:
    ... run.policy, run.sampler, run.prompts, run.log(step, metrics) ...
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean

import torch
import torch.distributed as dist

from megatron_zero.batching import Packing
from megatron_zero.build import (
    build_evaluation_prompts,
    build_policy,
    build_prompt_cursor,
    complete_hf_config,
    export_hf,
    load_tokenizer,
    local_model_dir,
    write_model_files,
)
from megatron_zero.config import RunConfig
from megatron_zero.config_io import to_dict
from megatron_zero.data.templates import stop_strings
from megatron_zero.determinism import sample_seed
from megatron_zero.evaluate import evaluate, evaluation_metrics, evaluation_record
from megatron_zero.grading import Grader
from megatron_zero.objective import describe_objective
from megatron_zero.observability.environment import collect_environment
from megatron_zero.observability.rollouts import write_rollouts
from megatron_zero.observability.run_dir import RunDir, create_run_dir, write_atomically
from megatron_zero.observability.sinks import make_sinks, read_metrics
from megatron_zero.observability.summary import print_summary
from megatron_zero.observability.timers import Timers
from megatron_zero.policy import checkpoint
from megatron_zero.policy.forward import policy_objective
from megatron_zero.policy.parallel import initialize
from megatron_zero.rewards.verifier_pool import VerifierPool
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import Graded, Prompt, RolloutGroup
from megatron_zero.weight_sync.colocated import ColocatedWeightSync

logger = logging.getLogger(__name__)

MIB = 1024**2


class Session:
    """A reinforcement-learning run between its start and its end; every method is collective."""

    def __init__(self, config: RunConfig, *, resume: bool) -> None:
        """Join the job, build engine and policy, load the last checkpoint when resuming.

        Raises:
            ValueError: the model, the data or the run directory do not fit the configuration.
        """
        self.config = config
        self.topology = initialize(config.parallel, seed=config.seed)
        self.run_dir = RunDir.of(config)
        self._exit = ExitStack()
        self.timers = Timers()
        self._start(resume)

    def _start(self, resume: bool) -> None:
        config, topology = self.config, self.topology
        is_first = topology.rank == 0
        tokenizer = load_tokenizer(config.model)
        hf_config = complete_hf_config(config.model, tokenizer)
        self._evaluation_prompts = build_evaluation_prompts(config, hf_config, tokenizer)
        self.prompts = build_prompt_cursor(config, tokenizer)
        self.packing = Packing(
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            max_tokens=config.batch.max_tokens_per_microbatch,
            alignment=topology.tp_size if config.parallel.sequence_parallel else 1,
        )
        self._model_files = self.run_dir.path / "model"
        if is_first:
            create_run_dir(config, resume=resume)
            source = local_model_dir(config.model.path, topology) if config.model.path else None
            write_model_files(self._model_files, config.model, hf_config, tokenizer, source)
        elif config.model.path:
            local_model_dir(config.model.path, topology)
        dist.barrier(group=topology.host_group)
        self.engine = VllmEngine(
            str(self._model_files),
            config.rollout,
            tokenizer=str(self._model_files),
            dtype=config.model.dtype,
            max_model_len=self._max_model_len(),
            rank=topology.rank,
            world_size=topology.world_size,
        )
        self.engine.sleep()  # the policy is built in the memory that is left
        self.policy = build_policy(
            config.model,
            hf_config,
            topology,
            parallel=config.parallel,
            optimizer=config.optimizer,
            objective=policy_objective(config.loss),
            num_optimizer_steps=config.num_steps * config.num_optimizer_steps,
            seed=config.seed,
            temperature=config.rollout.temperature,
            with_ref_policy=config.needs_ref_policy,
        )
        self.sampler = Sampler(self.engine, topology.host_group)
        self.weight_sync = ColocatedWeightSync(
            self.engine, self.policy.mapping.hf_names(), topology.host_group
        )
        pool = VerifierPool(
            config.answer_format,
            num_workers=config.reward.num_workers,
            timeout_s=config.reward.timeout_s,
            memory_limit_mib=config.reward.memory_limit_mib,
        )
        self.grader = Grader(self._exit.enter_context(pool), topology.host_group)
        self.start_step = self._load_checkpoint() if resume else 0
        self._evaluated: dict[int, dict[str, float]] = {}
        if is_first:
            self._report()
        self._sinks = self._exit.enter_context(
            make_sinks(
                config.logging,
                self.run_dir,
                topology.rank,
                name=config.name,
                num_steps=config.num_steps,
                start_step=self.start_step + 1,
                settings=to_dict(config),
            )
        )

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def _max_model_len(self) -> int:
        """What the engine must hold: a training sample, or the longest evaluation."""
        config = self.config
        lengths = [len(p.token_ids) for ps in self._evaluation_prompts.values() for p in ps]
        return max(
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            max(lengths, default=0) + config.max_evaluation_tokens,
        )

    def _report(self) -> None:
        """What will run and on what, before it runs."""
        kernels = self.policy.kernels() | {"engine": type(self.engine).__name__}
        environment = collect_environment(kernels, world_size=self.topology.world_size)
        create_run_dir(self.config, resume=True, environment=environment)
        print(describe_objective(self.config))
        t = self.topology
        print(
            f"layout: TP {t.tp_size} x PP {t.pp_size} x DP {t.dp_size}, "
            f"{self.engine.num_engines} rollout engine(s)"
        )
        print("kernels: " + ", ".join(f"{name} {value}" for name, value in kernels.items()))
        print(f"run directory: {self.run_dir.path}", flush=True)

    def sample(self, prompts: Sequence[Prompt], step: int) -> list[RolloutGroup]:
        """A group of responses to every prompt, from the weights of version `step`."""
        config = self.config

        def seed_of(place: int, prompt: Prompt, sample: int) -> int:
            return sample_seed(config.seed, step, place, prompt.index, sample)

        return self.sampler.sample(
            prompts,
            SamplingSettings(
                max_tokens=config.rollout.max_response_tokens,
                temperature=config.rollout.temperature,
                stop=stop_strings(config.data.template),
            ),
            group_size=config.rollout.group_size,
            seed_of=seed_of,
            policy_version=step,
        )

    def hf_weights(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The policy's weights for a sync, in buckets of `rollout.sync_bucket_mib`."""
        return self.policy.hf_weights(bucket_bytes=self.config.rollout.sync_bucket_mib * MIB)

    def is_due(self, done: int, every_num_steps: int) -> bool:
        """Whether something that happens every n steps, and not at the run's end, happens now."""
        return every_num_steps > 0 and done % every_num_steps == 0 and done < self.config.num_steps

    def log(self, done: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics with the time of its phases."""
        times = self.timers.pop()
        num_tokens = metrics["response/length_mean"] * self.config.responses_per_step
        throughput = {
            "throughput/tokens_per_s": num_tokens / times["time/step_s"],
            "data/epoch": self.prompts.epoch,
        }
        self._sinks.log(done, {**metrics, **times, **throughput})

    def evaluate(self, done: int) -> None:
        """Accuracy of the present policy on the held-out prompts; nothing without data sets."""
        if not self._evaluation_prompts:
            return
        with self.timers("evaluate"):
            results = evaluate(
                self.config,
                self._evaluation_prompts,
                self.sampler,
                self.grader,
                policy_version=done,
            )
        self._evaluated[done] = evaluation_metrics(results)
        self._sinks.log(done, self._evaluated[done] | self.timers.pop())
        if self.topology.rank == 0:
            write_atomically(self.run_dir.evaluation(done), evaluation_record(results).encode())

    def save_rollouts(
        self,
        done: int,
        groups: Sequence[RolloutGroup],
        graded: Sequence[Sequence[Graded]],
        advantages: torch.Tensor,
    ) -> None:
        """Write the step's rollouts when `logging.rollouts_every_num_steps` says so."""
        every = self.config.logging.rollouts_every_num_steps
        if self.topology.rank == 0 and every and (done % every == 0 or done == 1):
            write_rollouts(self.run_dir.rollouts(done), groups, graded, advantages.tolist())

    def save_checkpoint(self, done: int) -> None:
        """A sharded checkpoint after `done` steps; older ones go as `checkpoint.keep` says."""
        directory = self.run_dir.checkpoint(done)
        if done in checkpoint.saved_steps(self.run_dir.checkpoints):
            return
        checkpoint.save(
            directory, self.policy, {"step": done, "prompts": self.prompts.state_dict()}
        )
        if self.topology.rank == 0:
            checkpoint.prune(self.run_dir.checkpoints, keep=self.config.checkpoint.keep)

    def _load_checkpoint(self) -> int:
        """The step to go on from: the last complete checkpoint's, or 0."""
        steps = checkpoint.saved_steps(self.run_dir.checkpoints)
        if not steps:
            return 0
        state = checkpoint.load(self.run_dir.checkpoint(steps[-1]), self.policy)
        self.prompts.load_state_dict(state["prompts"])
        return int(state["step"])

    def finish(self) -> None:
        """Last evaluation, checkpoint and HF export, and the run in two tables."""
        done = self.config.num_steps
        if done not in self._evaluated:
            self.evaluate(done)
        self.save_checkpoint(done)
        if self.config.checkpoint.save_hf:
            self.engine.sleep()
            export_hf(
                self.policy,
                self._model_files,
                self.run_dir.hf(done),
                bucket_bytes=self.config.rollout.sync_bucket_mib * MIB,
            )
        self._sinks.close()
        if self.topology.rank == 0:
            print_summary(read_metrics(self.run_dir.metrics))
            if self.config.checkpoint.save_hf:
                print(f"model: {self.run_dir.hf(done)}")


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of all optimizer steps of a step: means, the largest of `max_`, sums of counts."""
    merged = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        last = name.rsplit("/", 1)[-1]
        combine = max if last.startswith("max_") else sum if last == "tokens" else fmean
        merged[name] = combine(values)
    return merged
