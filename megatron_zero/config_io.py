"""YAML and `dotted.key=value` <-> `RunConfig` and `PretrainConfig`, strict in both directions.

A typo in a setting must stop a run before it starts, so nothing is guessed here: every key must be
a declared field, every value must have the field's declared type, and each refusal names the full
path, the value and what would be valid. Overrides are all applied before the checks run, so two
settings that are only valid together can be given in any order.

What `save_config` writes gives an equal config back. `strict_yaml` says how plain words are read.
"""

import dataclasses
import difflib
import functools
import importlib.util
import operator
import re
import string
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_zero.checks import UserError
from megatron_zero.config import PretrainConfig, RunConfig, fail
from megatron_zero.strict_yaml import BOOLEANS, NULLS, dump_yaml, is_plain, load_yaml

Config = RunConfig | PretrainConfig
Recipes = Mapping[str, Callable[[], Config]]

KINDS: dict[str, type[Config]] = {"train": RunConfig, "pretrain": PretrainConfig}

_INTEGER = re.compile(r"[-+]?[0-9](_?[0-9]){0,30}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOTHING = (*(word for word in NULLS if word), "None")  # what a person may mean by these
_TYPE_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


class _Missing:
    """Stands for a value that was not given, in error messages."""

    def __repr__(self) -> str:
        return "<missing>"


_MISSING = _Missing()


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    """Declared type of every field of a section, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _leaf_paths(cls: type, path: str = "") -> list[str]:
    paths = []
    for name, hint in _field_types(cls).items():
        here = _join(path, name)
        paths += _leaf_paths(hint, here) if dataclasses.is_dataclass(hint) else [here]
    return paths


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"a section with keys {', '.join(_field_types(hint))}"
    if typing.get_origin(hint) is list:
        return "a list of text, as [a, b] (on a command line also a,b)"
    return _TYPE_NAMES[hint]


def _instead(value: Any, hint: Any) -> str:
    """What to write where `value`, of YAML or Python, is a slip: begins with `; `, or is ""."""
    is_list = typing.get_origin(hint) is list
    if value is None and (hint is str or is_list):
        return f"; for nothing write {'[]' if is_list else repr('')}"
    if isinstance(value, str):
        if is_list:
            return f"; a list of one is [{value}]" if value and "," not in value else ""
        if hint in (int, float, bool) and is_plain(value.strip(), hint):
            return "; in quotes it is text: take them away"
        if hint is int and _INTEGER.fullmatch(value):
            return f"; in YAML without _: {int(value)}"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if hint is str and isinstance(value, int | float):
        return "; put it in quotes"
    if is_list and isinstance(value, list) and value:
        odd = next(item for item in value if not isinstance(item, str))
        return f"; put {odd} in quotes" if isinstance(odd, int | float) else ""
    return ""


def _unknown_key(root: type, cls: type, path: str, key: object, value: object) -> NoReturn:
    """Refuse `key` of the section `cls` at `path`, naming what was probably meant."""
    names = list(_field_types(cls))
    near = [_join(path, name) for name in difflib.get_close_matches(str(key), names, n=1)]
    leaves = _leaf_paths(root)
    last = str(key).rpartition(".")[2]
    near += [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    if not near:
        near = difflib.get_close_matches(_join(path, key), leaves, n=1, cutoff=0.8)
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    section = path or "the config"
    fail(_join(path, key), value, f"unknown key; {hint}{section} has {', '.join(names)}")


def _checked(path: str, value: Any, hint: Any, root: Any = None) -> Any:
    """`value` as the declared type `hint`; refuses what is not of that type already.

    Only an integer given for a float is converted.
    """
    if typing.get_origin(hint) is list:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return list(value)
    elif hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(value) <= sys.float_info.max:  # false for nan
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    fail(path, value, f"must be {_describe(hint)}{_instead(value, hint)}")


def _build(path: str, data: Any, cls: type, root: type) -> Any:
    types = _field_types(cls)
    if not isinstance(data, Mapping):
        fail(path or "config", data, f"must be {_describe(cls)}")
    for key in data:
        if key not in types:
            _unknown_key(root, cls, path, key, data[key])
    values = {}
    for field in dataclasses.fields(cls):
        here, hint = _join(path, field.name), types[field.name]
        if field.name in data:
            build = _build if dataclasses.is_dataclass(hint) else _checked
            values[field.name] = build(here, data[field.name], hint, root)
        elif field.default is field.default_factory:  # both are missing
            fail(here, _MISSING, f"required: {_describe(hint)}")
    return cls(**values)


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Build a config from nested dictionaries, as YAML gives them, and run all its checks.

    Args:
        cls: `RunConfig` or `PretrainConfig`.
        data: one entry per field to set, sections as dictionaries; what is left out keeps its
            default.

    Raises:
        ValueError: unknown or missing key, wrong type, or a value that the config refuses.
    """
    return _build("", data, cls, cls)


def to_dict(config: Config) -> dict[str, Any]:
    """Every setting as nested dictionaries of plain values; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting under its dotted path, as overrides name it."""
    return {path: operator.attrgetter(path)(config) for path in _leaf_paths(type(config))}


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted paths whose value differs, with the old and the new value; both of one kind."""
    before, after = flatten(old), flatten(new)
    return {path: (before[path], after[path]) for path in before if before[path] != after[path]}


def kind_of(config: Config) -> str:
    """The command that runs this config: `train` or `pretrain`."""
    return next(kind for kind, cls in KINDS.items() if type(config) is cls)


def load_config(path: str | Path) -> Config:
    """Read a YAML file: one entry per setting, and `kind: train` or `kind: pretrain`.

    Raises:
        ValueError: the file cannot be read, is not YAML, or holds a setting that is not valid; the
            message starts with the file's name.
    """
    try:
        data = load_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}, line {line}: cannot be read: not UTF-8 text ({byte})") from None
    try:
        if not isinstance(data, dict):
            fail("config", data, "must be a mapping of settings")
        kind = data.pop("kind", _MISSING)
        if not isinstance(kind, str) or kind not in KINDS:
            fail("kind", kind, f"must be one of {', '.join(KINDS)}")
        return from_dict(KINDS[kind], data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def dump_config(config: Config) -> str:
    """The config as YAML text that `load_config` reads back."""
    kind = kind_of(config)
    data = {"kind": kind, **to_dict(config)}
    return f"# run again: megatron-zero {kind} <this file> name=<another name>\n{dump_yaml(data)}"


def save_config(config: Config, path: str | Path) -> None:
    """Write `config` to `path`, every setting included."""
    Path(path).write_text(dump_config(config), encoding="utf-8")


def _parse_text(path: str, text: str, hint: Any) -> Any:
    """The value that `text`, from a command line, has in a field of type `hint`."""
    if hint is str:
        if text in _NOTHING:
            fail(path, text, f"is a text here, not nothing; for nothing write {path}=")
        return text
    text = text.strip(string.whitespace)  # ASCII only, as float()
    if typing.get_origin(hint) is list:
        return _parse_list(path, text, hint)
    if hint is bool and text in BOOLEANS:
        return BOOLEANS[text]
    if hint is int and _INTEGER.fullmatch(text):
        return int(text)
    if hint is float and _NUMBER.fullmatch(text):
        return _checked(path, float(text), hint)
    instead = ""
    if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":
        instead = "; write it without the quotes" if is_plain(text[1:-1], hint) else ""
    elif hint is int and _NUMBER.fullmatch(text):
        instead = _instead(float(text), hint)
    fail(path, text, f"must be {_describe(hint)}{instead}")


def _parse_list(path: str, text: str, hint: Any) -> list[str]:
    if text.startswith("["):
        return _checked(path, load_yaml(text, path), hint)
    if not text:
        return []
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item or item in _NOTHING:
            described = f"{item!r} is a text here, not nothing" if item else "an item is empty"
            fail(path, text, f"{described}; for an empty list write {path}=")
    return items


def _set_override(root: type, data: dict[str, Any], override: str) -> None:
    """Write one override into `data`, the nested dictionaries of a config of class `root`."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(f"{override!r}: must be dotted.key=value, as in rollout.group_size=4")
    cls, done, rest = root, "", path
    while True:
        key, _, after = rest.partition(".")
        types = _field_types(cls)
        if key not in types:
            _unknown_key(root, cls, done, rest, text)
        done, hint = _join(done, key), types[key]
        if not dataclasses.is_dataclass(hint):
            if after:
                fail(path, text, f"{done} is a value, not a section")
            data[key] = _parse_text(path, text, hint)
            return
        if not after:
            keys = ", ".join(_field_types(hint))
            fail(path, text, f"is a section; set {path}.<key>, with key one of {keys}")
        cls, data, rest = hint, data[key], after


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `dotted.key=value` texts applied, all of them before the checks run.

    A text is read by the field's declared type: `1e-6` for a float, `true` or `false` (`True` and
    `TRUE` too, as in YAML), `a,b` or `[a, b]` for a list, anything (nothing too) for text, but for
    `None`, `null` and `~`, which would be names. The last one of a key wins.

    Raises:
        ValueError: unknown key, a text that is not of the field's type, or a config that is not
            valid with the new values.
    """
    data = to_dict(config)
    for override in overrides:
        _set_override(type(config), data, override)
    return from_dict(type(config), data)


def known_recipes() -> Recipes:
    """Every recipe of the package `recipes`: name -> function; none where it is not installed."""
    if importlib.util.find_spec("recipes") is None:
        return {}
    from recipes import RECIPES  # at call: recipes import this package's config

    return RECIPES


def _load_target(target: str, recipes: Recipes | None) -> Config:
    path = Path(target)
    if path.suffix in (".yaml", ".yml"):
        return load_config(path)
    recipes = known_recipes() if recipes is None else recipes
    if target in recipes:
        return recipes[target]()
    if path.is_dir():
        hint = f"; did you mean {path / 'config.yaml'}?" if (path / "config.yaml").exists() else ""
        raise UserError(f"{target}: is a folder, not a recipe or a YAML file{hint}")
    near = difflib.get_close_matches(target, recipes, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    names = ", ".join(sorted(recipes)) or "none"
    raise UserError(f"{target}: no such recipe, nor a .yaml file; {hint}recipes: {names}")


def resolve(
    target: str,
    overrides: Sequence[str],
    kind: str,
    recipes: Recipes | None = None,
    preset: Callable[[RunConfig], RunConfig] | None = None,
) -> Config:
    """The complete config of a run, from what a user typed.

    Args:
        target: a recipe's name, or a path to a YAML file.
        overrides: `dotted.key=value` texts.
        kind: the command, `train` or `pretrain`, that the config must be for.
        recipes: name -> function; None: the package `recipes`.
        preset: of `objective.PRESETS`, applied before the overrides; only for `train`.

    Raises:
        ValueError: with the setting's path, its value and what would be valid.
    """
    config = _load_target(target, recipes)
    if kind_of(config) != kind:
        raise UserError(f"{target}: is for `megatron-zero {kind_of(config)}`, not `{kind}`")
    if preset is not None:
        assert isinstance(config, RunConfig)
        config = preset(config)
    return apply_overrides(config, overrides)
