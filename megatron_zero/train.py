"""The training loop: prompt -> rollout -> reward -> advantage -> loss -> optimizer -> weight sync.

Colocated and on-policy: every rank holds its shard of the policy and (a part of) a rollout engine,
and runs this same program. There is no driver.

    torchrun --nproc-per-node 8 -m megatron_zero.train qwen2_5_math_7b
"""

import logging
from collections.abc import Sequence

from megatron_zero.config import MISMATCH_REASONS, RunConfig
from megatron_zero.launch_args import job, progress, run_rank

logger = logging.getLogger(__name__)


@job()
def train(config: RunConfig, *, resume: bool = False) -> None:
    """Run (or with `resume` continue) one complete training run; collective over the job.

    Raises:
        ValueError: the configuration cannot work with this model, data or run directory.
        RuntimeError: engine and policy disagree by more than `mismatch.max_kl`, or after the first
            weight sync by more than `mismatch.max_first_kl`.
        FloatingPointError: a gradient is not finite.
    """
    from megatron_zero.advantages import (
        advantage_function,
        groups_with_signal,
        less_kl,
        training_rewards,
    )

    progress("importing Megatron-Core and transformers")
    from megatron_zero.analysis.rollout_stats import rollout_metrics
    from megatron_zero.batching import build_global_batch, build_samples, set_advantages
    from megatron_zero.rollout_rounds import RolloutRounds
    from megatron_zero.session import Session, mean_metrics

    advantages_of = advantage_function(config.advantage)
    with Session(config, resume=resume) as run:
        policy, weight_sync, timers = run.policy, run.weight_sync, run.timers
        progress("the engine's first weights, evaluation, first step")
        # the engine always starts on our weights
        weight_sync.push(run.hf_weights(), version=run.start_step)
        run.verify_first_sync()
        run.evaluate(run.start_step)
        for step in range(run.start_step, config.num_steps):
            with timers("step"):
                rounds = RolloutRounds(
                    num_prompts=config.rollout.num_prompts_per_step,
                    max_rounds=config.rollout.max_rounds,
                )
                while rounds.num_missing:  # once, unless groups without signal are replaced
                    prompts, place = run.prompts.next_batch(rounds.num_missing), rounds.num_drawn
                    with timers("rollout"):
                        groups = run.sample(prompts, step, first_place=place)
                    with timers("reward"):
                        rounds.add(groups, run.grader.score(groups))
                groups, graded = rounds.chosen()
                rewards = training_rewards(
                    groups, graded, config.reward, max_length=config.rollout.max_response_tokens
                )
                advantages = advantages_of(rewards)

                with timers("train"):
                    run.use_policy()
                    samples = build_samples(
                        groups, graded, advantages, mask_truncated=config.loss.mask_truncated
                    )
                    batch = build_global_batch(samples, config, run.packing, step=step)
                    if config.needs_ref_policy:
                        batch = policy.with_ref_logprobs(batch)
                    # The policy before this step. With one optimizer step per rollout the
                    # current logprobs are the old ones, and no pass is needed for them.
                    if config.num_optimizer_steps > 1 or config.advantage.kl_reward_coef > 0:
                        batch = policy.with_old_logprobs(batch)
                    if config.advantage.kl_reward_coef > 0:
                        kl = policy.kl_to_ref(batch, num_samples=len(samples)).view_as(rewards)
                        coefficient = config.advantage.kl_reward_coef
                        advantages = advantages_of(less_kl(rewards, kl, coefficient))
                        batch = set_advantages(batch, advantages.flatten())
                    updates = []
                    for minibatch in batch.minibatches:
                        metrics = policy.forward_backward(minibatch).values
                        check_mismatch(metrics, config.max_mismatch_kl, step=step)
                        updates.append(metrics | policy.optimizer_step().values)

                with timers("sync"):
                    weight_sync.push(run.hf_weights(), version=step + 1)

            done = step + 1
            drawn = {"reward/shaped_mean": rewards.mean().item()} | rounds.metrics()
            found = rollout_metrics(groups, graded, groups_with_signal(advantages))
            found |= run.weight_metrics(batch, groups, graded)
            run.log(done, found | drawn | mean_metrics(updates))
            run.save_rollouts(done, groups, graded, advantages)
            if run.is_due(done, config.evaluation.every_num_steps):
                run.evaluate(done)
            if run.is_due(done, config.checkpoint.every_num_steps):
                run.save_checkpoint(done)
        run.finish()


def check_mismatch(metrics: dict[str, float], max_kl: float, *, step: int) -> None:
    """Stop before an update whose samples the policy itself would not have drawn.

    Raises:
        RuntimeError: the estimate of KL(engine || policy) is above `max_kl`, or no number.
    """
    kl = metrics["mismatch/kl"]
    if not kl <= max_kl:
        raise RuntimeError(
            f"step {step}: engine and policy disagree on the sampled tokens: mismatch/kl={kl:.3g} "
            f"(difference of a logprob: mean {metrics['mismatch/mean_abs']:.3g}, largest "
            f"{metrics['mismatch/max_abs']:.3g}) is above mismatch.max_kl={max_kl}; nothing was "
            f"updated. {MISMATCH_REASONS}."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of every rank, under torchrun or alone."""
    run_rank("train", argv, train)


if __name__ == "__main__":
    main()
