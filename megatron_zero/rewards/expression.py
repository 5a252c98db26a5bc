r"""A parser for the mathematics that answers are written in: LaTeX or ASCII -> a small tree.

Written by hand because the alternatives are unsafe on model text: sympy's `sympify` and
`parse_expr` evaluate Python. Here text can only become the nodes below, nothing is computed, and
the length of the input, the number of tokens and the depth of nesting are bounded before any work.

Where notation is ambiguous the usual reading is taken: `2\frac{1}{2}` and `1 2/3` are mixed
numbers, `x^12` has exponent 12 but `\frac12` is one half, `1/2x` is `(1/2)x`, `\sin 2x + 1` is
`sin(2x) + 1`, `e`, `i` and `\pi` are constants.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Optional, Union

from megatron_zero.rewards.tokens import CLOSING, FUNCTIONS, ParseError, Token

MAX_DEPTH = 40  # nested atoms and exponents; about six Python frames each
MAX_DIGITS = 400  # of one number, also through 1e400

_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon "
    "Phi Psi Omega hbar ell emptyset angle triangle"
)
_SYMBOLS = frozenset(_GREEK_NAMES.split())
_DECORATIONS = frozenset(["dot", "ddot", "bar", "overline", "hat", "vec", "tilde"])
_CLOSES = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
_GROUP_FUNCTIONS = {"\\lfloor": "floor", "\\lceil": "ceiling", "|": "abs"}


@dataclass(frozen=True, slots=True)
class Node:
    r"""A tree: `kind` of num, sym, const, add, mul, neg, pow, call, and those of `parse_answer`.

    Example: `2\pi + x^2` is
        add(mul(num 2, const pi), pow(sym x, num 2))
    """

    kind: str
    args: tuple["Node", ...] = ()
    value: Optional[Union[str, Fraction]] = None


def parse_expression(tokens: list[Token]) -> Node:
    """Parse tokens that are one formula, without commas or relations.

    Raises:
        ParseError: when they are not, or are nested deeper than `MAX_DEPTH`.
    """
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.position != len(tokens):
        raise ParseError(f"unexpected {tokens[parser.position].name!r}")
    return node


class _Parser:
    """Recursive descent; one method per level of precedence."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = [*tokens, Token("end", "")]
        self.position = 0
        self.depth = 0
        self.open_bars = 0  # inside |…| a bar closes

    def peek(self) -> Token:
        return self.tokens[self.position]

    def take(self) -> Token:
        self.position += 1
        if self.position == len(self.tokens):
            raise ParseError("unexpected end")
        return self.tokens[self.position - 1]

    def enter(self) -> None:
        """Every recursion passes here: through `atom` or `exponent_of`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")

    def at(self, *names: str) -> bool:
        token = self.peek()
        return token.kind == "mark" and token.name in names

    def accept(self, name: str) -> bool:
        """Take the mark `name` if it comes next."""
        found = self.at(name)
        self.position += found
        return found

    def expect(self, name: str) -> None:
        if not self.accept(name):
            raise ParseError(f"expected {name!r}, found {self.peek().name!r}")

    def sum(self) -> Node:
        terms = [self.product()]
        while self.at("+", "-"):
            terms.append(self.product())
        return _joined("add", terms)

    def product(self) -> Node:
        if self.minus():
            return Node("neg", (self.product(),))
        factors = [self.power()]
        while True:
            if self.accept("*"):
                factors.append(self.signed_power())
            elif self.accept("/"):
                factors.append(_reciprocal(self.signed_power()))
            elif self.starts_factor():
                token, before = self.peek(), self.tokens[self.position - 1]
                if token.kind == "number" and before.name not in (")", "!"):  # x2: x^2? x_2?
                    raise ParseError("a number behind a factor")
                is_zero = before.kind == "number" and not before.name.strip("0.")
                if is_zero or any(
                    t.kind == "text" and not t.name.isalpha() for t in (token, before)
                ):
                    raise ParseError("a 0 or a text beside a formula")
                factors.append(self.power())
            else:
                break
        return _joined("mul", factors)

    def minus(self) -> bool:
        """Take all signs; whether they make a minus."""
        minus = False
        while self.at("+", "-"):
            minus ^= self.take().name == "-"
        return minus

    def signed_power(self) -> Node:
        return Node("neg", (self.power(),)) if self.minus() else self.power()

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind != "mark":
            return token.kind != "end"
        if token.name == "|":
            return self.open_bars == 0
        return token.name in _CLOSES or (token.name not in CLOSING and token.name[1:].isalpha())

    def power(self) -> Node:
        base = self.atom()
        if self.accept("!"):
            base = Node("call", (base,), "factorial")
        return self.exponent_of(base)

    def exponent_of(self, base: Node) -> Node:
        if not self.accept("^"):
            return base
        self.enter()
        exponent = self.signed_power()
        self.depth -= 1
        return Node("pow", (base, exponent))

    def atom(self) -> Node:
        self.enter()
        node = self.primary(self.take())
        self.depth -= 1
        return node

    def primary(self, token: Token) -> Node:
        if token.kind == "number":
            return _number(token.name)
        if token.kind == "letter":
            return self.letter(token.name)
        if token.kind in ("word", "text"):
            return Node("sym", (), f"text {token.name.lower()}")
        if token.kind == "mark" and token.name in _CLOSES:
            return self.group(token.name)
        if token.kind == "mark" and token.name.startswith("\\"):
            return self.command(token.name[1:])
        raise ParseError(f"unexpected {token.name!r}")

    def group(self, opening: str) -> Node:
        self.open_bars, outer = int(opening == "|"), self.open_bars
        node = self.sum()
        self.expect(_CLOSES[opening])
        self.open_bars = outer
        name = _GROUP_FUNCTIONS.get(opening)
        return Node("call", (node,), name) if name else node

    def letter(self, name: str) -> Node:
        name += self.subscript()
        while self.at("'"):
            name += self.take().name
        if self.at("(") and name[0] in ("f", "g"):  # an unknown function
            return Node("call", (self.group(self.take().name),), name)
        return Node("const", (), name) if name in ("e", "i") else Node("sym", (), name)

    def subscript(self) -> str:
        """`_0`, `_{max}`: part of the name, not an operation."""
        return "_" + self.raw_argument() if self.accept("_") else ""

    def raw_argument(self) -> str:
        """The text of one argument, which is a name rather than a formula."""
        if not self.accept("{"):
            return self.take().name
        names = []
        while not self.accept("}"):
            if self.at("{"):
                raise ParseError("not a name")
            names.append(self.take().name)
        return "".join(names)

    def command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            binomial = Node("call", (top, bottom), "binomial")
            return binomial if name == "binom" else Node("mul", (top, _reciprocal(bottom)))
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name in ("pi", "infty"):
            return Node("const", (), name)
        if name in _SYMBOLS:
            return Node("sym", (), f"\\{name}{self.subscript()}")
        if name in _DECORATIONS:
            return Node("sym", (), f"\\{name} {self.raw_argument()}{self.subscript()}")
        raise ParseError(f"unknown command {name!r}")

    def argument(self) -> Node:
        r"""One argument of \frac, a group: `clean` has put braces around single digits."""
        if self.peek().kind == "number" and len(self.peek().name) > 1:
            raise ParseError("a number without braces")
        return self.atom()

    def root(self) -> Node:
        r"""`\sqrt{x}` and `\sqrt[n]{x}`, ASCII `sqrt(x)`; `\sqrt12` is the root of 12."""
        index = Node("num", (), Fraction(2))
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        return Node("call", (self.atom(), index), "root")

    def function(self, name: str) -> Node:
        r"""`\sin^2 x` is (sin x)^2 and `\sin^{-1} x` the inverse; `\log_b x` has base b."""
        base: tuple[Node, ...] = ()
        exponent: Optional[Node] = None
        if name == "log":  # without a base: one that is not known, so neither 10 nor e
            base = (self.atom() if self.accept("_") else Node("sym", (), "base of log"),)
        if self.accept("^"):
            exponent = self.group("{") if self.accept("{") else self.signed_power()
        call = Node("call", (self.function_argument(), *base), name)
        if exponent is None:
            return self.exponent_of(call) if self.tokens[self.position - 1].name == ")" else call
        if exponent == Node("neg", (Node("num", (), Fraction(1)),)):
            return Node("call", call.args, f"arc{name}")
        return Node("pow", (call, exponent))

    def function_argument(self) -> Node:
        r"""A group, or the factors up to the next operator or function: `\sin 2\theta \cos x`."""
        if self.at("(", "{", "[", "|"):
            return self.group(self.take().name)
        if self.at("-", "+"):
            return self.signed_power()
        factors = [self.power()]
        while self.starts_factor() and self.peek().name[1:] not in FUNCTIONS and not self.at("("):
            if self.peek().kind == "number":
                raise ParseError("a number behind a factor")
            factors.append(self.power())
        return _joined("mul", factors)


def _joined(kind: str, nodes: list[Node]) -> Node:
    """The sum or product of several; one alone is itself."""
    return nodes[0] if len(nodes) == 1 else Node(kind, tuple(nodes))


def _number(text: str) -> Node:
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise ParseError("number too long")
    return Node("num", (), Fraction(text))


def _reciprocal(node: Node) -> Node:
    return Node("pow", (node, Node("num", (), Fraction(-1))))
