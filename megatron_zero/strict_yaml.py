"""YAML without its surprises: what a plain word means, and no key given twice.

PyYAML follows version 1.1, where `no` is false, `1:30` is ninety and `1e-6` is text; the first two
are values somebody may want as text here (`no` is a prompt template), the third is how everybody
writes a learning rate. This reads plain words by version 1.2's core rules, refuses a key that is
given twice, and writes text that both versions read back as the same value.
"""

import re
import reprlib
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from megatron_zero.checks import UserError

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


BOOLEANS = {"true": True, "True": True, "TRUE": True}
BOOLEANS |= {"false": False, "False": False, "FALSE": False}
NULLS = ("null", "Null", "NULL", "~", "")

# Which plain words are not text, by their first character; the first match wins.
_RULES = [
    ("null", "|".join(NULLS), ["n", "N", "~", ""]),
    ("bool", "|".join(BOOLEANS), list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # those of `_RULES` only

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if not isinstance(key, str) or key in keys[:i]:
                problem = "is given twice" if isinstance(key, str) else "is not text"
                mark = node.value[i][0].start_mark
                raise ConstructorError(None, None, f"key {key!r} {problem}", mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Of a word that is not what its tag says, or a number of too many digits, the line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):
            kind = node.tag.removeprefix(_TAG)
            problem = f"{reprlib.repr(node.value)} cannot be read as {kind}"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """`010` is ten, not eight."""
        return int(self.construct_scalar(node))


_Loader.add_constructor(_TAG + "int", _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version would read as something else."""


for _name, _pattern, _first_characters in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^({_pattern})$"), _first_characters)


def load_yaml(text: str, source: str) -> Any:
    """The value of YAML `text`; `source` names it in errors.

    Raises:
        ValueError: not valid YAML, a key given twice, or a key that is not text.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem
        if isinstance(error, yaml.composer.ComposerError) and error.context:
            problem = f"{error.context}, {problem}"  # "expected a single document, but …"
        if "\\t" in problem:
            problem += "; use spaces"
        raise UserError(f"{source}{where}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"it holds the character {chr(error.character)!r}"
        raise UserError(f"{source}, line {line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: it is nested too deeply") from None


def is_plain(text: str, kind: type) -> bool:
    """Whether YAML would read `text` as an int, float or bool if it were not in quotes."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    loader.dispose()
    kinds = {int: ("int",), float: ("int", "float"), bool: ("bool",)}
    return tag.removeprefix(_TAG) in kinds.get(kind, ())


def dump_yaml(data: Any) -> str:
    """`data` (dictionaries, lists, numbers, text) as YAML that `load_yaml` reads back equal."""
    # escaped beyond ASCII: PyYAML loses U+0085 in text that it writes as it is
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)
