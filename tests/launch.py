"""Starting a worker script under torchrun, as users start the program."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


def torchrun(
    nproc: int, *arguments: "str | Path", timeout_s: float = 300, module: bool = False
) -> str:
    """Run a script (or, with `module`, a module) in `nproc` processes; its output.

    Fails the test with the end of the output when a process fails or time runs out.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        f"--nproc-per-node={nproc}",
        *(["-m"] if module else []),
        "--",
        *map(str, arguments),
    ]
    return run(command, timeout_s=timeout_s)


def run(command: "list[str]", *, timeout_s: float = 300, expect_status: int = 0) -> str:
    """Run a command from the repository's root; its output, errors included."""
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        timeout=timeout_s,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == expect_status, (
        f"status {result.returncode} of {' '.join(command)}:\n{result.stdout[-6000:]}"
    )
    return result.stdout
