"""Starting a job of several processes, as users start the program: torchrun, or a command.

A process of ours imports for ten seconds, and the tests start dozens on two cores. So `torchrun`
here is torch's own agent with its start method `forkserver`: ranks are forked from one process
that has imported what they need and done nothing else (`tests.imported_by_ranks`). Tests that go
through the command line start fresh processes.
"""

import multiprocessing
import os
import subprocess
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "",  # where it is set, every process compiles all that it imports
}


def torchrun(nproc: int, script: "str | Path", *arguments: object, timeout_s: float = 300) -> str:
    """Run a script, or a module by its dotted name, in `nproc` processes; what they printed.

    Fails the test with the end of the output when a process fails or time runs out.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from tests import rank

    os.environ.update(ENVIRONMENT)  # the fork server has it from here
    multiprocessing.set_forkserver_preload(["tests.imported_by_ranks"])
    with TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
        )
        failed = None
        try:
            elastic_launch(config, rank.run)(str(script), [*map(str, arguments)], timeout_s)
        except ChildFailedError as error:
            failed = error
        files = sorted(Path(logs).rglob("std*.log"))
        output = "".join(f.read_text(errors="replace") for f in files)
    assert failed is None, f"{failed}\n{output[-6000:]}"
    return output


def torchrun_anew(nproc: int, script: "str | Path", *arguments: object, timeout_s: float) -> str:
    """The same in fresh processes, for what the forked ones would not have: GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={nproc}", str(script), *map(str, arguments)]
    return run(command, timeout_s=timeout_s)


def run(
    command: "list[str]",
    *,
    timeout_s: float = 300,
    expect_status: int = 0,
    show_warnings: bool = False,
) -> str:
    """Run a command from the repository's root; its output, errors included."""
    environment = os.environ | ENVIRONMENT
    if show_warnings:
        del environment["PYTHONWARNINGS"]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        timeout=timeout_s,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == expect_status, (
        f"status {result.returncode} of {' '.join(command)}:\n{result.stdout[-6000:]}"
    )
    return result.stdout
