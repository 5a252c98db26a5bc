"""A rank that waits in a collective for another one, which ends as FAILING says.

Run by test_errors_of_ranks.py in jobs of two processes, as a run of `megatron_zero.train`.
"""

import os
import time

from megatron_zero.checks import fail
from megatron_zero.config import RunConfig
from megatron_zero.launch_args import run_rank


def run(config: RunConfig, *, resume: bool) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    os.write(1, f"pid {os.getpid()}\n".encode())  # in one piece: two ranks write to one pipe
    if dist.get_rank() == 1:
        if os.environ["FAILING"] == "mistake":
            fail("data.data_dir", "/data", "no such folder")
        if os.environ["FAILING"] == "crash":
            torch.zeros(2) + torch.zeros(3)
        time.sleep(100)
    dist.barrier()


run_rank("train", None, run)
