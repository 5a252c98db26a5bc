"""Under torchrun: end an evaluation that was killed, do the whole of it, then in one batch.

benchmarks_worker.py CONTINUED_DIR WHOLE_DIR AT_ONCE.jsonl <the command line's arguments>
"""

import sys
from pathlib import Path

from megatron_zero import evaluate
from megatron_zero.benchmark_run import BenchmarkRun
from megatron_zero.eval import parse_args
from megatron_zero.grading import Grader, verifier_pool


def main() -> None:
    continued, whole, at_once = map(Path, sys.argv[1:4])
    args, config = parse_args(sys.argv[4:])
    job = BenchmarkRun(config, False, args.save_every)
    job.run(continued)
    job.run(whole)
    with verifier_pool(config) as pool:
        grader = Grader(pool, job.group)
        # more tokens than the engine reads at once, where the batches before had few
        records = evaluate.evaluate(config, job.prompts, job.sampler, grader, 0)
    if job.group.rank() == 0:
        at_once.write_bytes(evaluate.to_jsonl(records))


if __name__ == "__main__":
    main()
