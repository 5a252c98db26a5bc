"""YAML without its surprises: what a plain word means, and no key given twice.

PyYAML follows version 1.1, where `no` is false, `1:30` is ninety and `1e-6` is text; the first two
are values somebody may want as text here (`no` is a prompt template), the third is how everybody
writes a learning rate. This reads plain words by version 1.2's core rules, refuses a key that is
given twice, and writes text that both versions read back as the same value.
"""

import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from megatron_zero.checks import UserError

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


# Which plain words are not text, by their first character; the first match wins.
_RULES = [
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
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
        raise UserError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def dump_yaml(data: Any) -> str:
    """`data` (dictionaries, lists, numbers, text) as YAML that `load_yaml` reads back equal."""
    # escaped beyond ASCII: PyYAML loses U+0085 in text that it writes as it is
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)
