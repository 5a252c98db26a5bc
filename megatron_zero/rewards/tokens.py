r"""From a cleaned answer (`normalize.clean`) to a bounded list of tokens, and brackets in it.

Aliases are resolved here (`\times` is `*`, `>=` is `\ge`), so that the parser knows one name for
each thing. Runs of four or more letters that name no function are words, not products of letters,
so that anagrams differ.
"""

import re
from dataclasses import dataclass
from itertools import accumulate

MAX_TOKENS = 400

_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_FAMILIES = [(name, f"arc{name}", f"{name}h", f"arc{name}h") for name in _TRIGONOMETRIC]
FUNCTIONS = frozenset(["ln", "log", "exp", *(name for family in _FAMILIES for name in family)])
_OTHER_SPELLINGS = r"""^ **~, ; and~* \times \cdot \ast~/ \div~\le \leq \leqslant <=~\lor or
~\ge \geq \geqslant >=~\ne \neq !=~< \lt~> \gt~\{ \lbrace~\} \rbrace~| \vert \mid \lvert \rvert
~\emptyset \varnothing~\infty oo inf infinity~\sqrt sqrt~\pi pi"""
_ALIASES = {name: line.split()[0] for line in _OTHER_SPELLINGS.split("~") for name in line.split()}
RELATIONS = frozenset(["=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\equiv"])
OPENING = frozenset(["(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\begin"])
CLOSING = frozenset([")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\end"])

_RECURRING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?(?:\{(\d+)\}|(\d))")
_TOKEN = re.compile(
    r"\s*(?:(?P<numeral>\d[\dA-Z]*(?:\.\d+)?_(?:\d+|\{ ?\w+ ?\}))"
    r"|(?P<value>(?<![A-Za-z\\])[A-DF-Za-df-hj-z]\(\d+\))"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)"
    r"|\\text\{(?P<text>[^{}]*)\}|(?P<letters>[A-Za-z]+)"
    r"|(?P<mark>\\[A-Za-z]+|\\.|\*\*|<=|>=|!=|[-+*/^_()\[\]{},;=<>|!&']))"
)


class ParseError(ValueError):
    """The text is not in the grammar, or larger than its bounds."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is number, letter, word, text or mark; `name` is the canonical text."""

    kind: str
    name: str


def tokenize(text: str) -> list[Token]:
    """Split a cleaned answer (`normalize.clean`) into at most `MAX_TOKENS` tokens.

    Raises:
        ParseError: a character outside the grammar, or a bound exceeded.
    """
    text = _RECURRING.sub(_recurring, text)
    tokens: list[Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS:
            raise ParseError(f"not a formula: {text[position : position + 20]!r}")
        position = match.end()
        kind = match.lastgroup or ""
        content = match[kind]
        if kind == "letters":
            tokens += _letter_tokens(content)
        elif kind == "mark":
            tokens.append(Token(kind, _ALIASES.get(content, content)))
        else:
            content = re.sub("[{} ]", "", content)
            is_letter = kind == "value" or (kind == "text" and len(content) == 1)
            # a numeral in another base is a name, as text is
            kind = "letter" if is_letter else "text" if kind == "numeral" else kind
            tokens.append(Token(kind, content))
    return tokens


def _recurring(found: re.Match[str]) -> str:
    r"""`0.1\overline{6}` is 0.1 and 6/90."""
    whole, places, period = found[1], found[2], found[3] or found[4]
    return f"({whole or 0}.{places}0+{period}/{'9' * len(period)}{'0' * len(places)})"


def _letter_tokens(run: str) -> list[Token]:
    """ASCII names (`sqrt`, `pi`, `oo`, `or`), words of four or more letters, or single letters."""
    lowered = run.lower()
    if lowered in _ALIASES or lowered in FUNCTIONS:
        return [Token("mark", _ALIASES.get(lowered, f"\\{lowered}"))]
    if len(run) >= 4 or (len(run) == 3 and run.isupper()):
        return [Token("word", lowered)]
    return [Token("letter", letter) for letter in run]


def _depths(tokens: list[Token]) -> list[int]:
    """How many brackets are open after each token; `[a,b)` counts as balanced."""
    names = [token.name if token.kind == "mark" else "" for token in tokens]
    return list(accumulate((name in OPENING) - (name in CLOSING) for name in names))


def split(tokens: list[Token], separators: frozenset[str]) -> tuple[list[list[Token]], list[str]]:
    """Cut at the separators that stand in no bracket, and which."""
    parts: list[list[Token]] = [[]]
    found: list[str] = []
    for token, depth in zip(tokens, _depths(tokens), strict=True):
        if token.kind == "mark" and depth == 0 and token.name in separators:
            parts.append([])
            found.append(token.name)
        else:
            parts[-1].append(token)
    return parts, found


def first_closes_last(tokens: list[Token]) -> bool:
    """Whether the bracket that opens first closes at the last token: not so in `(1,2),(3,4)`."""
    depths = _depths(tokens)
    return depths[-1] == 0 and all(depth > 0 for depth in depths[:-1])
