r"""From a cleaned answer (`normalize.clean`) to a bounded list of tokens, and brackets in it.

Aliases are resolved here (`\times` is `*`, `>=` is `\ge`), so that the parser knows one name for
each thing. Runs of four or more letters that name no function are words, not products of letters,
so that anagrams differ.
"""

import re
from dataclasses import dataclass

MAX_TOKENS = 400

_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc "
    "sinh cosh tanh coth ln log exp"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_OTHER_SPELLINGS = {
    "^": "**",
    ",": ";",
    "*": r"\times \cdot \ast",
    "/": r"\div",
    "\\le": r"\leq \leqslant <=",
    "\\ge": r"\geq \geqslant >=",
    "\\ne": r"\neq !=",
    "<": r"\lt",
    ">": r"\gt",
    "\\{": r"\lbrace",
    "\\}": r"\rbrace",
    "|": r"\vert \mid",
    "\\emptyset": r"\varnothing",
}
_ALIASES = {other: name for name, others in _OTHER_SPELLINGS.items() for other in others.split()}
RELATIONS = frozenset(["=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\equiv"])
OPENING = frozenset(["(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\begin"])
CLOSING = frozenset([")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\end"])

_TOKEN = re.compile(
    r"\s*(?:(?P<numeral>\d[\dA-Z]*(?:\.\d+)?_(?:\d+|\{ ?\w+ ?\}))"
    r"|(?P<number>\d*\.\d*\\(?:overline|bar|dot) ?\{?\d+\}?"
    r"|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)"
    r"|\\(?P<matrix>begin|end)\{[pbB]?(?:small)?matrix\}"
    r"|\\text\{(?P<text>[^{}]*)\}"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<mark>\\[A-Za-z]+|\\.|\*\*|<=|>=|!=|[-+*/^_()\[\]{},;=<>|!&']))"
)


class ParseError(ValueError):
    """The text is not in the grammar, or larger than its bounds."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is number, letter, word, text or mark; `name` is the canonical text."""

    kind: str
    name: str
    spaced: bool = False  # white space stood before it


def tokenize(text: str) -> list[Token]:
    """Split a cleaned answer (`normalize.clean`) into at most `MAX_TOKENS` tokens.

    Raises:
        ParseError: a character outside the grammar, or a bound exceeded.
    """
    tokens: list[Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MAX_TOKENS:
            raise ParseError(f"not a formula: {text[position : position + 20]!r}")
        spaced = text[position].isspace()
        position = match.end()
        kind = match.lastgroup or ""
        content = match[kind]
        if kind == "letters" and content.lower() in ("and", "or"):
            if tokens and tokens[-1].name == ",":
                tokens.pop()
            tokens.append(Token("mark", "," if content.lower() == "and" else "\\lor", spaced))
        elif kind == "letters":
            tokens += _letter_tokens(content, spaced)
        elif kind == "matrix":
            tokens.append(Token("mark", f"\\{content}", spaced))
        elif kind == "mark":
            tokens.append(Token("mark", _ALIASES.get(content, content), spaced))
        elif kind == "numeral":  # in another base: a name
            tokens.append(Token("text", re.sub("[{} ]", "", content), spaced))
        else:
            kind = "letter" if kind == "text" and len(content) == 1 else kind
            tokens.append(Token(kind, content, spaced))
    return tokens


def _letter_tokens(run: str, spaced: bool) -> list[Token]:
    """ASCII names (`sqrt`, `pi`, `oo`), words of four or more letters, else single letters."""
    lowered = run.lower()
    if lowered in FUNCTIONS or lowered in ("sqrt", "pi"):
        return [Token("mark", f"\\{lowered}", spaced)]
    if run in ("oo", "inf", "infinity"):
        return [Token("mark", "\\infty", spaced)]
    if len(run) >= 4 or (len(run) == 3 and run.isupper()):
        return [Token("word", lowered, spaced)]
    return [Token("letter", letter, spaced and i == 0) for i, letter in enumerate(run)]


def split(tokens: list[Token], separators: frozenset[str]) -> list[list[Token]]:
    """Cut at the separators that stand in no bracket; `[a,b)` counts as balanced."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        if token.kind == "mark":
            depth += (token.name in OPENING) - (token.name in CLOSING)
            if depth == 0 and token.name in separators:
                parts.append([])
                continue
        parts[-1].append(token)
    return parts


def first_closes_last(tokens: list[Token]) -> bool:
    """Whether the bracket that opens first closes at the last token: not so in `(1,2),(3,4)`."""
    depth = 0
    for position, token in enumerate(tokens):
        if token.kind == "mark":
            depth += (token.name in OPENING) - (token.name in CLOSING)
        if depth <= 0:
            return position == len(tokens) - 1
    return False
