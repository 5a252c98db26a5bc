"""Random numbers that depend only on what is named, in every process and Python version.

Only `random.Random.random` is used: the one method whose sequence Python promises to keep for a
seed. `hash()` is never used: it differs between processes for strings.
"""

import functools
import hashlib
import random


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but the parts' text.

    Example:
        stable_hash("epoch", 0, 3) != stable_hash("epoch", 3, 0)
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seeded_random(*parts: object) -> random.Random:
    """A generator of its own for one purpose, e.g. `seeded_random("solution", seed, index)`."""
    return random.Random(stable_hash(*parts))


def below(rng: random.Random, bound: int) -> int:
    """A number in [0, bound)."""
    return int(rng.random() * bound)


@functools.lru_cache(maxsize=2)  # read item by item
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """A permutation of range(size) that depends only on the three numbers."""
    rng = seeded_random("epoch", seed, epoch)
    keys = [rng.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)
