"""Test hosts on one machine: network namespaces with addresses, names and a switch of their own.

A process in one sees the other hosts over the network alone, as on a cluster; files are shared, as
on a cluster too. Needs root (or the capabilities to make namespaces).
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path

SUBNET = "10.79.{job}.{host}"
_numbers = itertools.count()


class Hosts:
    """`host0` to `host<n-1>`, joined by a bridge; a context manager that leaves nothing behind."""

    def __init__(self, directory: Path, num_hosts: int) -> None:
        self.names = [f"host{i}" for i in range(num_hosts)]
        self._job = os.getpid() % 250
        # The kernel takes namespaces down later than it says: no name is used twice. It allows 15
        # characters.
        number = next(_numbers)
        self._prefix = f"mz{os.getpid()}n{number}"
        self._bridge = f"mzb{os.getpid()}n{number}"
        self._hosts_file = directory / "hosts"
        lines = ["127.0.0.1 localhost"]
        lines += [f"{self.address(i)} {name}" for i, name in enumerate(self.names)]
        self._hosts_file.write_text("\n".join(lines) + "\n")

    def address(self, host: int) -> str:
        return SUBNET.format(job=self._job, host=host + 1)

    def __enter__(self) -> "Hosts":
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for i in range(len(self.names)):
            space, cable = f"{self._prefix}-{i}", f"{self._prefix}c{i}"
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for i in range(len(self.names)):
            subprocess.run(["ip", "link", "del", f"{self._prefix}c{i}"], check=False)
            subprocess.run(["ip", "netns", "del", f"{self._prefix}-{i}"], check=False)
        subprocess.run(["ip", "link", "del", self._bridge], check=False)

    def plug(self, host: int, *, into: bool) -> None:
        """Pull a host's network cable, or put it back: nobody is told."""
        _ip("link", "set", f"{self._prefix}c{host}", "up" if into else "down")

    def start(
        self, host: int, command: "list[str]", environment: "dict[str, str]", output: Path
    ) -> subprocess.Popen:
        """A command on one host, in a process group of its own."""
        inside = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        space = ["ip", "netns", "exec", f"{self._prefix}-{host}", "unshare", "--uts", "--mount"]
        words = [*space, "sh", "-c", inside, self.names[host], str(self._hosts_file), *command]
        with output.open("ab") as file:
            return subprocess.Popen(
                words, env=environment, stdout=file, stderr=file, start_new_session=True
            )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> "str | None":
    """Why this machine cannot have test hosts; None: it can."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "needs iproute2 and util-linux (ip, unshare)"
    name = f"mzprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"the kernel forbids network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a command that `Hosts.start` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
