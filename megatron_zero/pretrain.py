"""Next-token training of the policy on documents.

Used for domain pretraining before reinforcement learning, and to make the quickstart's small base
model. The same model, schedule, optimizer and checkpoints as in `train.py`, without an engine.

    torchrun --nproc-per-node 2 -m megatron_zero.pretrain quickstart_base
"""

import sys
from collections.abc import Sequence

from megatron_zero.config import PretrainConfig, check_layout
from megatron_zero.hf_config import read_hf_config
from megatron_zero.launch_args import parse_args, user_errors, world_size

MIB = 1024**2


def pretrain(config: PretrainConfig, *, resume: bool = False) -> None:
    """Run (or with `resume` continue) one complete pretraining run; collective over the job.

    Raises:
        ValueError: the configuration cannot work with this model, these documents or this folder.
        FloatingPointError: a gradient is not finite.
    """
    import torch.distributed as dist

    from megatron_zero import build
    from megatron_zero.batching import Packing, build_document_minibatch
    from megatron_zero.data.documents import DocumentStream
    from megatron_zero.observability.console import PRETRAIN_COLUMNS
    from megatron_zero.observability.environment import collect_environment
    from megatron_zero.observability.run_dir import RunDir, create_run_dir
    from megatron_zero.observability.sinks import make_sinks, read_metrics
    from megatron_zero.observability.summary import print_summary
    from megatron_zero.observability.timers import Timers
    from megatron_zero.policy import checkpoint
    from megatron_zero.policy.forward import next_token_objective
    from megatron_zero.policy.parallel import initialize

    topology = initialize(config.parallel, seed=config.seed)
    run_dir, timers = RunDir.of(config), Timers()
    tokenizer = build.load_tokenizer(config.model)
    hf_config = build.complete_hf_config(config.model, tokenizer)
    documents = DocumentStream(config.documents, tokenizer, config.seed)
    model_files = run_dir.path / "model"
    source = build.local_model_dir(config.model.path, topology) if config.model.path else None
    if topology.rank == 0:
        create_run_dir(config, resume=resume)
        build.write_model_files(model_files, config.model, hf_config, tokenizer, source)
    dist.barrier(group=topology.host_group)
    policy = build.build_policy(
        config.model,
        hf_config,
        topology,
        parallel=config.parallel,
        optimizer=config.optimizer,
        objective=next_token_objective,
        num_optimizer_steps=config.num_steps,
        seed=config.seed,
    )
    start_step = 0
    if resume and (steps := checkpoint.saved_steps(run_dir.checkpoints)):
        start_step = int(checkpoint.load(run_dir.checkpoint(steps[-1]), policy)["step"])
    if topology.rank == 0:
        environment = collect_environment(policy.kernels(), world_size=topology.world_size)
        create_run_dir(config, resume=True, environment=environment)
        print("kernels: " + ", ".join(f"{k} {v}" for k, v in policy.kernels().items()), flush=True)
    packing = Packing(
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        max_tokens=config.max_tokens_per_microbatch,
        alignment=topology.tp_size if config.parallel.sequence_parallel else 1,
    )
    with make_sinks(
        config.logging,
        run_dir,
        topology.rank,
        name=config.name,
        num_steps=config.num_steps,
        start_step=start_step + 1,
        columns=PRETRAIN_COLUMNS,
    ) as sinks:
        for step in range(start_step, config.num_steps):
            with timers("step"):
                minibatch = build_document_minibatch(documents.sequences(step), packing)
                metrics = policy.forward_backward(minibatch).values
                metrics = metrics | policy.optimizer_step().values
            times = timers.pop()
            speed = metrics["policy/tokens"] / times["time/step_s"]
            sinks.log(step + 1, {**metrics, **times, "throughput/tokens_per_s": speed})
            every = config.checkpoint.every_num_steps
            if step + 1 == config.num_steps or (every and (step + 1) % every == 0):
                state = {"step": step + 1}
                checkpoint.save(run_dir.checkpoint(step + 1), policy, state)
                if topology.rank == 0:
                    checkpoint.prune(run_dir.checkpoints, keep=config.checkpoint.keep)
    if config.checkpoint.save_hf:
        directory = run_dir.hf(config.num_steps)
        build.export_hf(policy, model_files, directory, bucket_bytes=512 * MIB)
    if topology.rank == 0:
        print_summary(read_metrics(run_dir.metrics))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of every rank, under torchrun or alone."""
    with user_errors():
        args = parse_args("pretrain", sys.argv[1:] if argv is None else argv)
        assert isinstance(args.config, PretrainConfig)
        check_layout(args.config, read_hf_config(args.config.model), world_size())
    pretrain(args.config, resume=args.resume)


if __name__ == "__main__":
    main()
