"""`step_000010`: how everything of a step is named, and which names are a step's.

Checkpoints, exports, rollouts and evaluations are found again by name, and old checkpoints are
deleted by name. So a name either is exactly what `step_name` gives or it is somebody else's: a copy
(`step_000010 (copy)`), something kept (`step_000010_keep`), another width. What is not a step's is
never read, counted or removed. Standard library only.
"""

import re
from pathlib import Path
from typing import Optional

_STEP = re.compile(r"step_([0-9]{6,})")


def step_name(step: int) -> str:
    """`step_000010`; up to a million steps it sorts by step."""
    return f"step_{step:06d}"


def step_of(name: str) -> Optional[int]:
    """The step that `step_name` names so; None for any other name.

    Example:
        step_of("step_000010") == 10
        step_of("step_10") is None and step_of("step_000010.bak") is None
    """
    match = _STEP.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    return step if step_name(step) == name else None  # 0000010 has too many digits


def steps_in(folder: Path, suffix: str = "") -> list[int]:
    """Steps of which `folder` has something named `step_000010` and `suffix`, in order.

    A folder that is not there has none.
    """
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    steps = [step_of(name.removesuffix(suffix)) for name in names if name.endswith(suffix)]
    return sorted(step for step in steps if step is not None)
