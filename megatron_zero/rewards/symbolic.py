"""Are two expressions equal? Exact rationals first, then sympy, and never more than is bounded.

sympy evaluates while it builds (`9**9**9**9` never returns), so every power, factorial and
floor is bounded here before sympy sees it. What exceeds a bound is `Undecidable`, which counts as
not equal.

Numbers are used to tell expressions apart, never to call them equal: values that differ by more
than 1e-20 at one point are different, everything else must be proven.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Union

import sympy

from megatron_zero.rewards.expression import Node
from megatron_zero.rewards.tokens import FUNCTIONS

MAX_BITS = 20_000  # of any number: 10^{6000}
MAX_MIXED_BITS = 4000  # of a number beside symbols, roots or functions
MAX_EXPONENT = 1000  # of anything but a number
MAX_ROOT_BITS = 512  # of a number under a root, which sympy tries to factor
MAX_ROOT_INDEX = 100
MAX_FACTORIAL = 1000
MAX_TAME = 20  # any number in what is rounded, or in a factorial of symbols
MAX_TERMS = 400  # when multiplied out, both sides together
MAX_POLYNOMIAL_DEGREE = 64  # sympy stores x^n as n + 1 coefficients
MAX_SYMBOLS = 10
MAX_TOWER = 2  # powers in exponents

Value = Union[Fraction, sympy.Expr]

_SYMPY_NAMES = {name: name.replace("arc", "a") for name in FUNCTIONS} | {"ln": "log"}
_FUNCTIONS = {name: getattr(sympy, sympy_name) for name, sympy_name in _SYMPY_NAMES.items()}
_to_sympy: Callable[[Value], sympy.Expr] = sympy.sympify  # never given text
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}
_INFINITE = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)

# What sympy raises on input it cannot treat; none of them says anything about equality.
_SYMPY_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
_SYMPY_FAILURES += (ValueError, sympy.polys.polyerrors.BasePolynomialError)


class Undecidable(Exception):
    """The expression is undefined, or larger than what is evaluated."""


def are_equal(left: Node, right: Node) -> bool:
    """Whether two expressions are, provably, the same number or function of their symbols."""
    if left == right:
        return True
    try:
        values = evaluate(left), evaluate(right)
    except Undecidable:
        return False
    first, second = map(_to_sympy, values)
    if first == second or all(isinstance(value, Fraction) for value in values):
        return first == second
    if first.has(*_INFINITE) or second.has(*_INFINITE):
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    too_large = (
        len(symbols) > MAX_SYMBOLS
        or max(_largest_bits(first), _largest_bits(second)) > MAX_MIXED_BITS
        or _num_terms(first) + _num_terms(second) > MAX_TERMS
    )
    if too_large or _differ_somewhere(first, second, symbols):
        return False
    return _proven_zero(first - second)


def evaluate(node: Node) -> Value:
    """A `Fraction` where the value is rational by arithmetic alone, else a sympy expression.

    Raises:
        Undecidable: division by zero, or a bound of this module exceeded.
    """
    if isinstance(node.value, Fraction):
        return node.value
    if node.kind == "sym":
        return sympy.Symbol(str(node.value))
    if node.kind == "const":
        return _CONSTANTS[str(node.value)]
    args = [evaluate(arg) for arg in node.args]
    if node.kind == "neg":
        return -args[0]
    if node.kind in ("add", "mul"):
        return _combine(node.kind, args)
    if node.kind == "pow":
        return _power(args[0], args[1])
    if node.kind == "call":
        return _call(str(node.value), args)
    raise Undecidable(f"a {node.kind} is not a number")


def _from_sympy(value: sympy.Expr) -> Value:
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _largest_bits(expr: sympy.Basic) -> int:
    """Size of the largest number in it."""
    numbers = expr.atoms(sympy.Rational)
    return max((max(abs(int(n.p)), int(n.q)).bit_length() for n in numbers), default=1)


def _combine(kind: str, args: list[Value]) -> Value:
    """Sum or product: rationals among themselves first, the rest by sympy."""
    rationals = [arg for arg in args if isinstance(arg, Fraction)]
    others = [arg for arg in args if not isinstance(arg, Fraction)]
    if sum(map(_bits, rationals)) > MAX_BITS:
        raise Undecidable("number too large")
    total = Fraction(sum(rationals) if kind == "add" else math.prod(rationals))
    if not others:
        return total
    operation = sympy.Add if kind == "add" else sympy.Mul
    return _from_sympy(operation(_to_sympy(total), *others))


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction):
        if isinstance(base, Fraction) and exponent.denominator == 1:
            return _integer_power(base, exponent.numerator)
        return _rational_power(base, exponent)
    if _tower(exponent) >= MAX_TOWER:
        raise Undecidable("tower of powers")
    numbers = exponent.atoms(sympy.Rational)
    if any(abs(n) > MAX_EXPONENT or int(n.q).bit_length() > 64 for n in numbers):
        raise Undecidable("exponent too large")
    return _from_sympy(sympy.Pow(_to_sympy(base), exponent))


def _integer_power(base: Fraction, exponent: int) -> Fraction:
    if base == 0 and exponent < 0:
        raise Undecidable("division by zero")
    if base in (0, 1, -1):
        return base ** (exponent if exponent == 0 else 2 - exponent % 2)
    if _bits(base) * abs(exponent) > MAX_BITS:
        raise Undecidable("number too large")
    return base**exponent


def _rational_power(base: Value, exponent: Fraction) -> Value:
    """A root of a number, or a power of an expression."""
    if isinstance(base, Fraction):
        if _bits(base) > MAX_ROOT_BITS or _bits(exponent) > MAX_ROOT_INDEX.bit_length():
            raise Undecidable("root too large")
        if base == 0 and exponent < 0:
            raise Undecidable("division by zero")
    else:
        # ((2x)^1000)^1000 would multiply out its coefficient.
        size = max(abs(exponent.numerator), exponent.denominator)
        if size > MAX_EXPONENT or _largest_bits(base) * size > MAX_BITS:
            raise Undecidable("exponent too large")
    return _from_sympy(sympy.Pow(_to_sympy(base), _to_sympy(exponent)))


def _call(name: str, args: list[Value]) -> Value:
    if name == "root":
        return _root(args[0], args[1])
    if name in ("factorial", "binomial"):
        return _combinatorial(name, args)
    if name in ("floor", "ceiling", "abs"):
        return _rounded(name, args[0])
    if name == "log" and len(args) == 2 and args[1] in (0, 1, sympy.E):
        if args[1] != sympy.E:
            raise Undecidable("logarithm to base 0 or 1")
        args = args[:1]
    if any(isinstance(arg, Fraction) and _bits(arg) > MAX_MIXED_BITS for arg in args):
        raise Undecidable("argument too large")
    if name == "exp":
        return _power(sympy.E, args[0])
    return _from_sympy(_FUNCTIONS[name](*map(_to_sympy, args)))


def _root(radicand: Value, index: Value) -> Value:
    """The n-th root; real for negative numbers and odd n: cube root of -8 is -2."""
    if not isinstance(index, Fraction) or index == 0:
        raise Undecidable("root index")
    odd = index.denominator == 1 and index.numerator % 2 == 1
    if odd and isinstance(radicand, Fraction) and radicand < 0:
        return -_rational_power(-radicand, 1 / index)
    if isinstance(radicand, Fraction) and (1 / index).denominator == 1:
        return _integer_power(radicand, (1 / index).numerator)
    return _rational_power(radicand, 1 / index)


def _combinatorial(name: str, args: list[Value]) -> Value:
    for arg in args:
        if isinstance(arg, Fraction) and not (arg.denominator == 1 and 0 <= arg <= MAX_FACTORIAL):
            raise Undecidable(f"argument of {name}")
    numbers = [_to_sympy(arg) for arg in args]
    exact = all(isinstance(arg, Fraction) for arg in args)
    if not exact and not all(map(_is_tame, numbers)):
        raise Undecidable(f"argument of {name}")
    return _from_sympy(getattr(sympy, name)(*numbers))


def _rounded(name: str, arg: Value) -> Value:
    """Floor, ceiling, absolute value; sympy works out every digit before the decimal point."""
    if not isinstance(arg, Fraction) and not _is_tame(arg):
        raise Undecidable(f"argument of {name}")
    function = {"floor": sympy.floor, "ceiling": sympy.ceiling, "abs": sympy.Abs}[name]
    return _from_sympy(function(_to_sympy(arg)))


def _is_tame(expr: sympy.Basic) -> bool:
    """Small numbers, small powers, no factorials: its value has few digits at small arguments."""
    small = all(max(abs(int(n.p)), int(n.q)) <= MAX_TAME for n in expr.atoms(sympy.Rational))
    return small and not _tower(expr) and not expr.has(sympy.factorial, sympy.binomial)


def _tower(expr: sympy.Basic) -> int:
    """How many exponents that are no numbers are stacked: 0 for x^2, 1 for 2^x, 2 for 2^{2^x}."""
    below = max((_tower(arg) for arg in expr.args), default=0)
    if isinstance(expr, sympy.exp) or (isinstance(expr, sympy.Pow) and not expr.exp.is_Rational):
        return max(below, 1 + _tower(expr.args[-1]))
    return below


def _num_terms(expr: sympy.Basic) -> int:
    """Upper bound on the number of terms when multiplied out, cut off above `MAX_TERMS`."""
    counts = [_num_terms(arg) for arg in expr.args]
    if isinstance(expr, sympy.Add):
        count = sum(counts)
    elif isinstance(expr, sympy.Pow) and expr.exp.is_Rational:
        base, power = counts[0], abs(int(expr.exp))
        count = 1 if base == 1 else math.comb(base + power - 1, power) if power < 64 else MAX_TERMS
        count = max(count, base)
    else:
        count = math.prod(counts)
    return min(count, MAX_TERMS + 1)


def _differ_somewhere(first: sympy.Expr, second: sympy.Expr, symbols: list[sympy.Symbol]) -> bool:
    """Whether the values at fixed points differ; False when they agree or cannot be computed."""
    # Odd numbers, since evalf gives large nonsense, not infinity, where a denominator vanishes.
    for first_prime, step, divisor in ((170, 7, 811), (90, 5, 1009)):
        primes = (sympy.prime(first_prime + step * i) for i in range(len(symbols)))
        point = {symbol: sympy.Rational(next(primes), divisor) for symbol in symbols}
        try:
            values = [_parts(expr.evalf(30, subs=point, maxn=200)) for expr in (first, second)]
        except _SYMPY_FAILURES:
            continue
        scale = 1 + sum(abs(part) for value in values for part in value)
        if any(abs(a - b) > scale * sympy.Float("1e-20") for a, b in zip(*values, strict=True)):
            return True
    return False


def _parts(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Real and imaginary part of a number.

    Raises:
        ValueError: for anything else, as when a function has no value at the point.
    """
    real, imaginary = value.as_real_imag()
    for part in (real, imaginary):
        if not (part.is_Float or part.is_Rational) or not part.is_finite:
            raise ValueError(f"not a finite number: {value}")
    return real, imaginary


def _proven_zero(difference: sympy.Expr) -> bool:
    """Whether sympy can show, without approximation, that the difference is zero."""
    steps: list[Callable[[sympy.Expr], sympy.Expr]] = [sympy.expand]
    powers = [power.exp for power in difference.atoms(sympy.Pow) if power.exp.is_Rational]
    small = _largest_bits(difference) <= MAX_ROOT_BITS
    if small and all(abs(exponent) <= MAX_POLYNOMIAL_DEGREE for exponent in powers):
        steps += [lambda expr: sympy.cancel(sympy.together(expr)), sympy.simplify]
    if difference.is_algebraic and not difference.free_symbols:
        steps.append(_minimal_polynomial_root)
    for step in steps:
        try:
            if step(difference) == 0:
                return True
        except _SYMPY_FAILURES:
            continue
    return False


def _minimal_polynomial_root(number: sympy.Expr) -> sympy.Expr:
    """0 if the algebraic number is 0, decided by its minimal polynomial; else the number."""
    x = sympy.Dummy("x")
    return sympy.S.Zero if sympy.minimal_polynomial(number, x) == x else number
