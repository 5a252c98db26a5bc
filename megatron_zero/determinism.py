"""Seeds that depend on what is drawn, never on where or in which order.

A response's seed is a function of (run, step, prompt, sample), so the same run gives the same
responses on any number of engines and after any resume.
"""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values with a stable `repr` (numbers, strings).

    Example:
        derive_seed(0, "rollout", 12, 7, 3) is the same in every process, version and machine.
    """
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_seed(run_seed: int, step: int, place: int, prompt_index: int, sample: int) -> int:
    """The seed of one training response; `place` in the step: a prompt may come twice in one."""
    return derive_seed(run_seed, "rollout", step, place, prompt_index, sample)
