"""One run's parts, built in order, and what a loop does besides its verbs: log, evaluate, save.

with Session(config, resume=False) as run:
    ... run.policy, run.sampler, run.prompts, run.log(step, metrics) ...
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from statistics import fmean

import torch

from megatron_zero import build, evaluate, first_sync
from megatron_zero.analysis.rollout_stats import weight_metrics
from megatron_zero.batching import sample_weights
from megatron_zero.config import RunConfig
from megatron_zero.config_io import to_dict
from megatron_zero.data.stop_tokens import check_responses_can_end
from megatron_zero.data.templates import stop_strings
from megatron_zero.determinism import sample_seed
from megatron_zero.grading import Grader, verifier_pool
from megatron_zero.hf_config import num_positions
from megatron_zero.launch_args import progress
from megatron_zero.losses import policy_objective
from megatron_zero.objective import describe_objective
from megatron_zero.observability.rollouts import write_rollouts
from megatron_zero.observability.run_dir import write_atomically
from megatron_zero.observability.signal_watch import STEPS_WITHOUT_SIGNAL, SignalWatch
from megatron_zero.observability.sinks import make_sinks, read_metrics
from megatron_zero.observability.summary import print_summary
from megatron_zero.observability.timers import Timers
from megatron_zero.policy import checkpoint
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler, merged
from megatron_zero.rollout.vllm_engine import VllmEngine
from megatron_zero.types import GlobalBatch, Graded, Prompt, RolloutGroup
from megatron_zero.weight_sync.colocated import ColocatedWeightSync

logger = logging.getLogger(__name__)

MIB = 1024**2


class Session(AbstractContextManager):
    """A reinforcement-learning run between its start and its end; every method is collective."""

    def __init__(self, config: RunConfig, *, resume: bool) -> None:
        """Join the job, build engine and policy, load the last checkpoint when resuming.

        Raises:
            ValueError: the model, the data or the run directory do not fit the configuration.
        """
        self.config = config
        self._exit = ExitStack()
        self.timers = Timers()
        start = build.start_run(config, resume=resume)
        self.topology, self.run_dir, tokenizer, hf_config, self._stop_ids = start
        template = config.data.template
        check_responses_can_end(self._stop_ids, stop_strings(template), config.model)
        progress("prompts")
        self._num_positions = num_positions(hf_config)[0]
        self._held_out = evaluate.evaluation_prompts(config, self._num_positions, tokenizer)
        self._evaluated: set[int] = set()
        self.prompts = build.build_prompt_cursor(config, tokenizer)
        progress("rollout engine")
        self._build_engine()
        progress("policy")
        self.policy = build.build_policy(
            config,
            hf_config,
            self.topology,
            objective=policy_objective(config.loss),
            num_optimizer_steps=config.num_steps * config.num_optimizer_steps,
            temperature=config.rollout.temperature,
            with_ref_policy=config.needs_ref_policy,
            balance_coef=config.loss.balance_coef,
        )
        budget = config.batch.max_tokens_per_microbatch
        self.packing = build.packing(config.parallel, self.topology, budget, self.policy.mapping)
        self.weight_sync = ColocatedWeightSync(
            self.engine, self.policy.mapping.hf_names(), self.topology.host_group
        )
        self.start_step = self._load_checkpoint() if resume else 0
        if self.topology.rank == 0:
            print(describe_objective(config))
        engines = f"{type(self.engine).__name__} x {self.engine.num_engines}"
        build.report(config, self.policy, self.run_dir, engine=engines)
        self._watch = self._build_watch()
        self._sinks = self._exit.enter_context(
            make_sinks(
                config.logging,
                self.run_dir,
                self.topology.rank,
                name=config.name,
                num_steps=config.num_steps,
                start_step=self.start_step + 1 if self.start_step else 0,
                settings=to_dict(config),
            )
        )

    def _build_watch(self) -> SignalWatch:
        """On rank 0, which has the metrics, it knows the steps that a resumed run has done."""
        past = []
        if self.start_step and self.topology.rank == 0:
            records = read_metrics(self.run_dir.metrics)
            past = [record for record in records if record["step"] <= self.start_step]
        return SignalWatch(
            warn_after=self.config.logging.warn_after_steps_without_signal,
            max_response_tokens=self.config.rollout.max_response_tokens,
            template=self.config.data.template,
            answer_format=self.config.answer_format,
            records=past,
        )

    def _build_engine(self) -> None:
        """Engine, sampler, verifier; before the policy, which is built in what memory is left."""
        config, topology = self.config, self.topology
        # The engine must hold a training sample, and the longest evaluation.
        evaluation = evaluate.max_model_len(config, self._held_out, self._num_positions)
        self.engine = VllmEngine(
            str(self.run_dir.model),
            config.rollout,
            tokenizer=str(self.run_dir.model),
            stop_token_ids=self._stop_ids,
            dtype=config.model.dtype,
            max_model_len=max(config.max_sample_tokens, evaluation),
            rank=topology.rank,
            world_size=topology.world_size,
        )
        self.engine.sleep()
        self.sampler = Sampler(self.engine, topology.host_group)
        pool = self._exit.enter_context(verifier_pool(config))
        self.grader = Grader(pool, topology.host_group)

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def sample(
        self, prompts: Sequence[Prompt], step: int, *, first_place: int = 0
    ) -> list[RolloutGroup]:
        """A group of responses to every prompt, from the weights of version `step`.

        Args:
            first_place: of the step's prompts, which the first of these is: seeds depend on it.
        """
        config = self.config

        def seed_of(place: int, prompt: Prompt, sample: int) -> int:
            return sample_seed(config.seed, step, first_place + place, prompt.index, sample)

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
        if self.config.optimizer.offload:
            self.policy.offload()
        return self.policy.hf_weights(bucket_bytes=self.config.rollout.sync_bucket_mib * MIB)

    def verify_first_sync(self) -> None:
        """Compare the engine with the policy on a few tokens, before anything depends on it.

        Raises:
            RuntimeError: they disagree by more than `mismatch.max_first_kl`.
        """
        config = self.config
        prompts = self.prompts.peek(first_sync.PROMPTS_PER_ENGINE * self.engine.num_engines)
        settings = SamplingSettings(
            max_tokens=min(first_sync.MAX_TOKENS, config.rollout.max_response_tokens),
            temperature=config.rollout.temperature,
        )
        groups = first_sync.draw(self.sampler, prompts, settings, version=self.start_step)
        self.use_policy()
        logprobs = first_sync.policy_logprobs(self.policy, groups, self.packing)
        agreement = first_sync.compare(groups, logprobs, max_kl=config.max_first_mismatch_kl)
        if self.topology.rank == 0:
            print(agreement, flush=True)
        if config.optimizer.offload or self.engine.weights_version is None:  # it slept
            self.weight_sync.push(self.hf_weights(), version=self.start_step)

    def use_policy(self) -> None:
        """The engine sleeps, the policy has the device; undone by the next weight sync."""
        self.engine.sleep()
        if self.config.optimizer.offload:
            self.policy.onload()

    def is_due(self, done: int, every_num_steps: int) -> bool:
        """Whether something that happens every n steps, and not at the run's end, happens now."""
        return every_num_steps > 0 and done % every_num_steps == 0 and done < self.config.num_steps

    def log(self, done: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics with the time of its phases; warn when nothing is learned."""
        times = self.timers.pop()
        num_tokens = metrics["response/length_mean"] * self.config.responses_per_step
        throughput = {
            "throughput/tokens_per_s": num_tokens / times["time/step_s"],
            "data/epoch": self.prompts.epoch,
            STEPS_WITHOUT_SIGNAL: float(self._watch.observe(metrics)),
        }
        self._sinks.log(done, {**metrics, **times, **throughput})
        if self._watch.is_due and self.topology.rank == 0:
            print(self._watch.warning(), flush=True)

    def weight_metrics(
        self, batch: GlobalBatch, groups: Sequence[RolloutGroup], graded: Sequence[Sequence[Graded]]
    ) -> dict[str, float]:
        """Where the step's gradient comes from, over the batches of all ranks; collective."""
        weights = merged(sample_weights(batch), self.topology.host_group)
        limit = self.config.rollout.max_response_tokens
        return weight_metrics(groups, graded, weights, max_response_tokens=limit)

    def evaluate(self, done: int) -> None:
        """Accuracy of the present policy on the held-out prompts; nothing without data sets."""
        if not self._held_out:
            return
        with self.timers("evaluate"):
            parts = self.sampler, self.grader
            records = evaluate.evaluate(self.config, self._held_out, *parts, done)
        self._evaluated.add(done)
        results = evaluate.summarize(records)
        self._sinks.log(done, evaluate.evaluation_metrics(results) | self.timers.pop())
        if self.topology.rank == 0:
            path = self.run_dir.evaluation(done)
            write_atomically(path.with_suffix(".jsonl"), evaluate.to_jsonl(records))
            settings = {"model": self.config.name, "step": done}
            settings |= evaluate.sampling_settings(self.config.evaluation)
            write_atomically(path, evaluate.results_json(results, settings))

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
        offload = self.config.optimizer.offload
        if offload:
            self.use_policy()
        checkpoint.save_and_prune(
            self.run_dir.checkpoint(done),
            self.policy,
            {"step": done, "prompts": self.prompts.state_dict()},
            keep=self.config.checkpoint.keep,
        )
        if offload and done < self.config.num_steps:
            self.weight_sync.push(self.hf_weights(), version=done)

    def _load_checkpoint(self) -> int:
        """The step to go on from: the last complete checkpoint's, or 0."""
        state = checkpoint.load_latest(self.run_dir.checkpoints, self.policy)
        if state is None:
            return 0
        self.prompts.load_state_dict(state["prompts"])
        return int(state["step"])

    def finish(self) -> None:
        """Last evaluation, checkpoint and HF export, and the run in two tables."""
        done = self.config.num_steps
        if self._held_out and done not in self._evaluated:
            progress("last evaluation")
            self.evaluate(done)
        progress("last checkpoint")
        self.save_checkpoint(done)
        if self.config.checkpoint.save_hf:
            self.engine.sleep()
            bucket_bytes = self.config.rollout.sync_bucket_mib * MIB
            build.export_hf(self.policy, self.run_dir, done, bucket_bytes=bucket_bytes)
        self._sinks.close()
        if self.topology.rank == 0:
            print_summary(read_metrics(self.run_dir.metrics))
            if summary := self._watch.summary():
                print(summary, flush=True)


def mean_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of all optimizer steps of a step: means, the largest of `max_`, sums of counts."""
    merged = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        last = name.rsplit("/", 1)[-1]
        combine = max if last.startswith("max_") else sum if last == "tokens" else fmean
        merged[name] = combine(values)
    return merged
