"""One rank of a test's job (`tests.launch.torchrun`)."""

import faulthandler
import os
import runpy
import sys


def run(script: str, arguments: "list[str]", timeout_s: float) -> None:
    """Become `script`, a path or a module's dotted name, as `python` would run it.

    After `timeout_s` seconds every thread's stack is printed and the process ends.
    """
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
