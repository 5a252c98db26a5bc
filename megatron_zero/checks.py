"""How a setting is refused: its dotted path, its value, and what would be valid; sizes."""

from typing import Any, NoReturn

CONFIG_OPTIONS = {"frozen": True, "kw_only": True, "slots": True}  # of every section


def round_up(number: int, multiple: int) -> int:
    """The next multiple: lengths to an alignment, a vocabulary to the ranks that share it."""
    return -(-number // multiple) * multiple


class UserError(ValueError):
    """What a user gave cannot work: a setting, a file, a model. Its text says what would.

    A process that ends with it prints the text and no traceback; any other exception, a plain
    `ValueError` of deeper code too, is a crash (`failures`).
    """


def fail(path: str, value: object, valid: str) -> NoReturn:
    """Refuse one setting: every configuration error has this form."""
    raise UserError(f"{path}={value!r}: {valid}")


def at_least(section: object, prefix: str, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value < bound:
            fail(f"{prefix}.{name}", value, f"must be at least {bound}")


def one_of(section: object, prefix: str, name: str, valid: "list[str]") -> None:
    value = getattr(section, name)
    if value not in valid:
        fail(f"{prefix}.{name}", value, f"must be one of {', '.join(valid)}")


def divides(path: str, value: int, total: int, what: str) -> None:
    """Refuse a `value` that does not divide `total`."""
    if total % value:
        fail(path, value, f"must divide {what}={total}")


def check_run(config: Any) -> None:
    """What every kind of run must have."""
    if not config.name or "/" in config.name or config.name.startswith("."):
        fail("name", config.name, "must be a plain folder name")
    if not config.runs_dir:  # the run would be in the file system's root
        fail("runs_dir", "", "must be a folder; '.' is the one you are in")
    for setting in ("name", "runs_dir"):
        if "\0" in getattr(config, setting):
            fail(setting, getattr(config, setting), "must not hold a NUL character")
    if config.num_steps < 1:
        fail("num_steps", config.num_steps, "must be at least 1")
    if config.seed < 0:
        fail("seed", config.seed, "must be at least 0")
    if config.optimizer.offload and config.model.dtype != "bf16":
        valid = "needs model.dtype='bf16': float32 weights are the optimizer's own"
        fail("optimizer.offload", True, valid)
    if reduced := config.optimizer.reduced_dtypes:
        name, dtype = next(iter(reduced.items()))
        if config.model.dtype != "bf16" or not config.parallel.use_distributed_optimizer:
            valid = "needs model.dtype='bf16' and parallel.use_distributed_optimizer"
            fail(f"optimizer.{name}", dtype, valid)
