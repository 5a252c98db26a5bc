"""Next-token training of the policy on documents.

Used for domain pretraining before reinforcement learning, and to make the quickstart's small base
model. The same model, schedule, optimizer and checkpoints as in `train.py`, without an engine.

    torchrun --nproc-per-node 2 -m megatron_zero.pretrain quickstart_base
"""

from collections.abc import Sequence

from megatron_zero.config import PretrainConfig
from megatron_zero.launch_args import job, run_rank

MIB = 1024**2


@job()
def pretrain(config: PretrainConfig, *, resume: bool = False) -> None:
    """Run (or with `resume` continue) one complete pretraining run; collective over the job.

    Raises:
        ValueError: the configuration cannot work with this model, these documents or this folder.
        FloatingPointError: a gradient is not finite.
    """
    from megatron_zero import build
    from megatron_zero.batching import build_document_minibatch
    from megatron_zero.data.documents import DocumentStream
    from megatron_zero.losses import next_token_objective
    from megatron_zero.observability.console import PRETRAIN_COLUMNS
    from megatron_zero.observability.sinks import make_sinks, read_metrics
    from megatron_zero.observability.summary import print_summary
    from megatron_zero.observability.timers import Timers
    from megatron_zero.policy import checkpoint

    topology, run_dir, tokenizer, hf_config, _ = build.start_run(config, resume=resume)
    documents, timers = DocumentStream(config.documents, tokenizer, config.seed), Timers()
    policy = build.build_policy(
        config,
        hf_config,
        topology,
        objective=next_token_objective,
        num_optimizer_steps=config.num_steps,
    )
    state = checkpoint.load_latest(run_dir.checkpoints, policy) if resume else None
    start_step = state["step"] if state else 0
    build.report(config, policy, run_dir)
    budget = config.max_tokens_per_microbatch
    packing = build.packing(config.parallel, topology, budget, policy.mapping)
    sinks = make_sinks(
        config.logging,
        run_dir,
        topology.rank,
        name=config.name,
        num_steps=config.num_steps,
        start_step=start_step + 1 if start_step else 0,
        columns=PRETRAIN_COLUMNS,
    )
    with sinks:
        for step in range(start_step, config.num_steps):
            with timers("step"):
                minibatch = build_document_minibatch(documents.sequences(step), packing)
                metrics = policy.forward_backward(minibatch).values
                metrics |= policy.optimizer_step().values
            done, times = step + 1, timers.pop()
            speed = metrics["policy/tokens"] / times["time/step_s"]
            sinks.log(done, {**metrics, **times, "throughput/tokens_per_s": speed})
            every = config.checkpoint.every_num_steps
            if done == config.num_steps or (every and done % every == 0):
                checkpoint.save_and_prune(
                    run_dir.checkpoint(done), policy, {"step": done}, keep=config.checkpoint.keep
                )
    if config.checkpoint.save_hf:
        build.export_hf(policy, run_dir, config.num_steps, bucket_bytes=512 * MIB)
    if topology.rank == 0:
        print_summary(read_metrics(run_dir.metrics))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of every rank, under torchrun or alone."""
    run_rank("pretrain", argv, pretrain)


if __name__ == "__main__":
    main()
