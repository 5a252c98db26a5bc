r"""Are two expressions equal? Exact rationals, else values to 300 digits at several points.

Rational arithmetic is exact, whatever the size of the numbers. Everything else is evaluated twice
(40 digits to tell most wrong answers apart quickly, then 300), by a walk over the tree that bounds
every operation before it is done: there is nothing here that can take long, and no rewriting of
expressions, which is where computer algebra hangs.

Agreement to 240 digits proves nothing about numbers that are closer than that. So whatever could
be is refused instead (`Undecidable`, which counts as not equal): a number of more than 400 bits
beside a root or a function, a value beyond 10^120, and one that is not zero but below 10^-40. With
symbols the expressions must agree at every point of `_POINTS` where both are defined: different
analytic functions do not, and the points at +-10^9 tell |x - 5| from 5 - x.
"""

import math
import threading
import zlib
from fractions import Fraction
from typing import Any, Optional, Union

import mpmath

from megatron_zero.rewards.expression import Node
from megatron_zero.rewards.tokens import FUNCTIONS

MAX_BITS = 20_000  # of any rational: 10^{6000}
MAX_MIXED_BITS = 400  # of a rational beside symbols, roots or functions
MAX_FACTORIAL = MAX_ROOT_INDEX = 1000
MAX_HYPERBOLIC = 40  # tanh(40) is 1 - 10^-34
MAX_NODES = 200  # different ones, both sides together
DIGITS = (40, 300)
LARGEST, SMALLEST = 120, 40  # powers of ten: |value| < 10^120, and 0 or > 10^-40

# Magnitude of the symbols, and signs of the first, second, third; those of the fourth again.
_SIGNS = ((1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1))
_POINTS = [(size, signs) for size in (0.3, 2.7, 1e9) for signs in _SIGNS]

Value = Union[Fraction, Any]  # or a real or complex number of an mpmath context
_contexts = threading.local()  # mpmath changes the precision of a context while it computes


class Undecidable(Exception):
    """The expression is undefined, or larger than what is evaluated."""


class _NotReal(Undecidable):
    """A value that is not real although everything it is made of is."""


def are_equal(left: Node, right: Node) -> bool:
    """Whether two expressions are the same number or function of their (real) symbols."""
    if left == right:
        return True
    nodes = [*_nodes(left), *_nodes(right)]
    names = _names(nodes)
    if any(node.value == "infty" for node in nodes):
        return False
    is_complex = not names or any(node.kind == "const" and node.value == "i" for node in nodes)
    is_piecewise = any(node.kind == "call" and node.value in ("abs", "root") for node in nodes)
    outcomes: set[str] = set()
    points = [_point(names, *point) for point in (_POINTS if names else _POINTS[:1])]
    for may_be_complex in (is_complex, True):
        for point in points:
            try:
                if not _agree(left, right, point, may_be_complex):
                    return False
                outcomes.add("agree")
            except _NotReal:
                outcomes.add("not real")
            except Undecidable:
                if is_piecewise:
                    return False
        if outcomes != {"not real"}:  # sqrt(-1 - x^2), (-1)^n: not real anywhere
            break
    return "agree" in outcomes


def exact(node: Node) -> Fraction:
    """The value, if it is rational by arithmetic alone.

    Raises:
        Undecidable: if it is not, or has no value, or exceeds a bound of this module.
    """
    value = _Evaluation(DIGITS[0], {}, is_complex=True).value(node)
    if not isinstance(value, Fraction):
        raise Undecidable("not rational")
    return value


def position(node: Node) -> Any:
    """The real number that an expression without symbols is, to 40 digits, for comparisons.

    Raises:
        Undecidable: if it is none, or exceeds a bound of this module.
    """
    evaluation = _Evaluation(DIGITS[0], {}, is_complex=False)
    value = evaluation.number(evaluation.value(node))
    if not isinstance(value, evaluation.context.mpf):
        raise Undecidable("not real")
    return value


def rational_ratio(first: Node, second: Node) -> Optional[Fraction]:
    """What the first is divided by the second at a point, if defined, as a small fraction."""
    names = _names([*_nodes(first), *_nodes(second)])
    evaluation = _Evaluation(DIGITS[0], _point(names, *_POINTS[4]), is_complex=False)
    try:
        values = [evaluation.number(evaluation.value(node)) for node in (first, second)]
        ratio = evaluation.checked(evaluation.number(values[0] / values[1]), values)
    except (Undecidable, ZeroDivisionError):
        return None
    return Fraction(str(ratio)).limit_denominator(10**6) if names and ratio else None


def _point(names: list[str], size: float, signs: tuple[int, ...]) -> dict[str, Fraction]:
    unit = Fraction(round(size * 1000), 1000)
    return {n: unit * signs[i % 3] * Fraction(811 + 7 * i, 809 + i) for i, n in enumerate(names)}


def _nodes(node: Node) -> list[Node]:
    return [node, *(below for arg in node.args for below in _nodes(arg))]


def _names(nodes: list[Node]) -> list[str]:
    return sorted({str(node.value) for node in nodes if node.kind == "sym"})


def _agree(left: Node, right: Node, point: dict[str, Fraction], is_complex: bool) -> bool:
    """Whether two expressions have the same value at a point.

    Raises:
        Undecidable: if one of them has none, or none that may be trusted.
    """
    for digits in DIGITS:
        evaluation = _Evaluation(digits, point, is_complex=is_complex)
        first, second = evaluation.value(left), evaluation.value(right)
        if isinstance(first, Fraction) and isinstance(second, Fraction):
            return first == second
        difference = evaluation.number(first) - evaluation.number(second)
        if abs(difference) > evaluation.largest * evaluation.tolerance:
            return False
    return True


class _Evaluation:
    """Values at one point, with one number of digits."""

    def __init__(self, digits: int, point: dict[str, Fraction], *, is_complex: bool) -> None:
        contexts = _contexts.__dict__
        if digits not in contexts:
            contexts[digits] = mpmath.MPContext()
            contexts[digits].dps = digits
        self.context = contexts[digits]
        self.point, self.is_complex, self.digits = point, is_complex, digits
        self.tolerance = self.context.mpf(10) ** -(digits * 4 // 5)
        self.largest = self.context.one
        self.known: dict[Node, Value] = {}  # so that a sum of equal terms costs one

    def value(self, node: Node) -> Value:
        """A `Fraction` where the value is rational by arithmetic alone, else a number.

        Raises:
            Undecidable: division by zero, or a bound of this module exceeded.
        """
        if node not in self.known:
            self.known[node] = self.computed(node)
            if len(self.known) > MAX_NODES:
                raise Undecidable("too many operations")
        return self.known[node]

    def computed(self, node: Node) -> Value:
        if isinstance(node.value, Fraction):
            return node.value
        if node.kind == "sym" and self.point:
            return self.number(self.point[str(node.value)])
        if node.kind == "const" and node.value != "infty":
            return {"pi": +self.context.pi, "e": +self.context.e, "i": self.context.j}[node.value]
        if node.kind not in ("neg", "add", "mul", "pow", "call"):
            raise Undecidable(f"a {node.kind} is not a number")
        args = [self.value(arg) for arg in node.args]
        if node.kind == "neg":
            return -args[0]
        if all(isinstance(arg, Fraction) for arg in args):
            found = _rational(node, args)
            if found is not None:
                return found
        numbers = [self.number(arg) for arg in args]
        try:
            return self.checked(self.apply(node, args, numbers), numbers)
        except (ArithmeticError, ValueError, mpmath.libmp.NoConvergence) as error:
            raise Undecidable(f"{node.kind} {node.value}: {error}") from error

    def number(self, value: Value) -> Value:
        """As a number of the context."""
        if not isinstance(value, Fraction):
            return value
        if _bits(value) > MAX_MIXED_BITS:
            raise Undecidable("number too large")
        number = self.context.mpf(value.numerator) / value.denominator
        self.largest = max(self.largest, abs(number))
        return number

    def checked(self, value: Value, args: list[Value]) -> Value:
        """The value of an operation, if it is neither too large nor suspiciously small."""
        if isinstance(value, self.context.mpc):
            if abs(value.imag) <= self.tolerance * max(1, abs(value)):
                value = value.real
            elif not self.is_complex:
                raise _NotReal
        size = abs(value)
        if not size <= self.context.mpf(10) ** LARGEST:  # nor NaN
            raise Undecidable("value too large")
        self.largest = max(self.largest, size)
        if self.digits == DIGITS[-1] and 0 < size < self.context.mpf(10) ** -SMALLEST:
            if size > self.largest * self.tolerance:
                raise Undecidable("too small to be told from 0")
            return self.context.zero
        return value

    def apply(self, node: Node, args: list[Value], numbers: list[Value]) -> Value:
        """One operation on numbers, `args` having the exact ones among them."""
        context, first, name = self.context, numbers[0], str(node.value)
        if node.kind in ("add", "mul"):
            return (context.fsum if node.kind == "add" else context.fprod)(numbers)
        if node.kind == "pow":
            return self.power(first, numbers[1])
        if name == "exp":
            return self.power(+context.e, first)
        if name == "root":
            return self.root(first, args[1], numbers[1])
        bound = MAX_HYPERBOLIC if name.endswith("h") else math.inf
        bound = MAX_FACTORIAL if name in ("factorial", "binomial") else bound
        if any(abs(number) > bound for number in numbers):
            raise Undecidable(f"argument of {name}")
        if name in FUNCTIONS or name in ("abs", "factorial", "binomial"):
            function = {"abs": "fabs"}.get(name, name.replace("arc", "a"))
            return getattr(context, function)(*numbers)
        # Unknown, as f, or not analytic, as floor: depends on the name and the argument alone.
        return context.cos(first * (zlib.crc32(name.encode()) % 97 + 1)) + first / 7

    def power(self, base: Value, exponent: Value) -> Value:
        if base == 0 and self.context.re(exponent) <= 0:
            raise Undecidable("a power of 0")
        if base != 0 and abs(exponent * self.context.log(abs(base))) > LARGEST * 3:
            raise Undecidable("power too large")
        return self.context.power(base, exponent)

    def root(self, radicand: Value, exact_index: Value, index: Value) -> Value:
        """The n-th root; real for negative numbers and odd n: cube root of -8 is -2."""
        if not isinstance(exact_index, Fraction) or not 0 < abs(exact_index) <= MAX_ROOT_INDEX:
            raise Undecidable("root index")
        odd = exact_index.denominator == 1 and exact_index.numerator % 2 == 1
        if odd and isinstance(radicand, self.context.mpf) and radicand < 0:
            return -self.power(-radicand, 1 / index)
        return self.power(radicand, 1 / index)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _rational(node: Node, args: list[Fraction]) -> Optional[Fraction]:
    """An operation on rationals if its result is rational by arithmetic alone, else None."""
    name = str(node.value)
    if node.kind in ("add", "mul"):
        if sum(map(_bits, args)) > MAX_BITS:
            raise Undecidable("number too large")
        return Fraction(sum(args) if node.kind == "add" else math.prod(args))
    if node.kind == "pow":
        base, exponent = args
        if exponent.denominator != 1 or (base == 0 and exponent <= 0):
            return None
        if base in (0, 1, -1):
            exponent = exponent and 2 - exponent % 2
        if _bits(base) * abs(exponent) > MAX_BITS:
            raise Undecidable("number too large")
        return base**exponent
    if name in ("factorial", "binomial"):
        if not all(arg.denominator == 1 and 0 <= arg <= MAX_FACTORIAL for arg in args):
            raise Undecidable(f"argument of {name}")
        function = math.factorial if name == "factorial" else math.comb
        return Fraction(function(*(arg.numerator for arg in args)))
    rounding = {"floor": math.floor, "ceiling": math.ceil, "abs": abs}.get(name)
    return Fraction(rounding(args[0])) if rounding else None
