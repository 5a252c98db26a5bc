r"""Answers made to stall, crash or fool a checker. All are wrong for the golds of the tests.

`hostile_answers(path)`: code among them would create the file `path`.
"""

FUNCTIONS = ("sin", "cos", "tan", "exp", "ln", "arctan", "sinh", "log_2")


def hostile_answers(path: str) -> list[str]:
    """A few hundred texts, of up to a few hundred kB."""
    return [*_towers(), *_factorials(), *_long(), *_deep(), *_roots(), *_algebra(), *_code(path)]


def _towers() -> list[str]:
    towers = ["9**9**9**9", "9^{9^{9^{9}}}", "9^9^9^9^9^9", "2^{2^{2^{2^{2^{2}}}}}", "(9^9)^{9^9}"]
    towers += ["10^{10^{10}}", "10^{-10^{10}}", "2^{10^{100}}", "(x+1)**200000", "(x+1)^{10^{9}}"]
    towers += ["x^{x^{x^{x^{x}}}}", "e^{e^{e^{e^{e}}}}", "e^{e^{e^{100}}}", "(1+10^{-9})^{10^{9}}"]
    towers += [
        "((2x)^{1000})^{1000}",
        "2^{20001}",
        "(-1)^{10^{30}+x}",
        r"\pi^{\pi^{\pi^{\pi^\pi}}}",
    ]
    towers += ["1.0000001^{999999999}", "0.5^{99999999}", "i^{i^{i^{i^{10^9}}}}", "1e400", "1e-400"]
    towers += [
        "1e999999999",
        "1e-999999999",
        "1" * 399 + "e399",
        "9" * 400 + "^9",
        "9^" * 150 + "9",
    ]
    towers += ["0^0^0", "0^{-1}", "2^{-" * 30 + "1" + "}" * 30, r"(\sqrt2)^{10^{12}}"]
    towers += ["*".join(["9^{999}"] * 60), "+".join(["9^{999}"] * 60), "2^{" * 45 + "}" * 45]
    return towers + [f"{base}^{{{power}}}^2" for base in (2, 3) for power in (10**6, 10**9)]


def _factorials() -> list[str]:
    found = ["1000000!", "(10!)!", "((10!)!)!", "((x!)!)!", "10^{9}!", "(10^{10})!", "5!!!!!!!"]
    found += ["!" * 300, "5" + "!" * 300, r"\binom{10^9}{5\cdot10^8}", r"\binom{1000000}{500000}"]
    found += [r"\binom{x^{99}}{y^{99}}", "(1000^x)!", "1000!" * 60, "(0.5)!", "(-1)!", "(x-1000)!"]
    found += ["+".join(["999!"] * 70), r"(\pi!)!", "(e^{e^{x}})!", r"\frac{(10^6)!}{(10^6-1)!}"]
    return found


def _long() -> list[str]:
    pieces = [
        "1",
        "9",
        "(",
        ")",
        "{",
        "}",
        "x",
        "1+",
        "-",
        "\\",
        "\\frac",
        "\\sqrt{",
        " ",
        ",",
        "$",
    ]
    pieces += ["|", "^", "_", "!", "é", "\u0000", "\\text{", "\\left(", "1,", "\\pm", "%", "1,000,"]
    pieces += [
        "\\begin{pmatrix}",
        "&",
        "\\\\",
        "a b ",
        "cm ",
        "per ",
        "5 cm^2 ",
        ".",
        "0.\\overline{",
    ]
    pieces += [
        "\\boxed{",
        "²",
        "½",
        "\ud800",
        "^\\circ",
        "x=",
        "\\cup",
        "or ",
        "\\{",
        "\\mod",
        "=",
        "<",
    ]
    sized = [(1990, "s"), (100_000, "L")]
    return [(piece * size)[:size] for piece in pieces for size, _ in sized]


def _deep() -> list[str]:
    pairs = [
        ("(", ")"),
        ("{", "}"),
        ("[", "]"),
        (r"\{", r"\}"),
        (r"\left(", r"\right)"),
        ("|", "|"),
    ]
    pairs += [(r"\frac{1}{1+", "}"), ("(1,", ")"), (r"\sqrt{", "}"), (r"\text{", "}"), ("-(", ")")]
    pairs += [(r"\lfloor ", r"\rfloor "), (r"\begin{pmatrix}", r"\end{pmatrix}"), ("f(", ")")]
    return [a * depth + "1" + b * depth for a, b in pairs for depth in (30, 90, 10_000)]


def _roots() -> list[str]:
    nested = "2"
    for _ in range(35):
        nested = rf"\sqrt{{2+{nested}}}"
    primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)
    roots = "+".join(rf"\sqrt{{{p}}}" for p in primes)
    found = [nested, roots, rf"\frac{{1}}{{{roots}}}", r"\sqrt" * 300 + "2"]
    found += ["(" + "+".join(rf"\sqrt[{p}]{{{p}}}" for p in primes) + ")^{99}", r"\sqrt[10^9]{2}"]
    found += [rf"\sqrt{{{10**399 + 7}}}", r"\sqrt[0]{2}", r"\sqrt[x]{x}", r"\sqrt[-1]{0}"]
    found += [r"\sqrt{-1}^{99999}"]
    return found + [rf"\sqrt[{n}]{{\sqrt[{n}]{{\sqrt[{n}]{{{n}}}}}}}" for n in (99, 997, 9999)]


def _algebra() -> list[str]:
    found = ["(x+y+z+w)^{50}(a+b+c)^{50}", "*".join(f"(x+{i})" for i in range(60))]
    found += ["+".join(rf"\frac{{1}}{{x+{i}}}" for i in range(40)), r"\frac{x^{1000}-1}{x-1}"]
    found += ["+".join(f"x_{{{i}}}" for i in range(99)), "+".join(f"x^{{{i}}}" for i in range(90))]
    found += ["abcdefghijklmnopqrstuvwxyz", "1,1," * 95 + "1", r"\pm 1" * 90, r"\pm 1," * 60 + "1"]
    found += [
        ",".join(rf"\sin {i}" for i in range(80)),
        ",".join(rf"\sqrt{{{i}}}" for i in range(75)),
    ]
    found += [
        ",".join(rf"\ln(x+{i})" for i in range(45)),
        r"\sin((e^{1000})^{1000})",
        r"\sin(10^{399})",
    ]
    for name in FUNCTIONS:
        found += [rf"\{name}(" * 35 + "x" + ")" * 35, rf"\{name} x+" * 90 + "1", rf"\{name}" * 300]
        found += [rf"\{name}(10^{{100}}\pi)", rf"\{name}(x^{{99}})^{{99}}", rf"\{name}(0)^{{-1}}"]
        found += [rf"\{name}(2)" * 60]
    found += ["<".join(["x"] * 100), "=".join(["1"] * 150), r"\cup".join(["(1,2)"] * 60)]
    found += [r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 12)] * 12) + r"\end{pmatrix}"]
    return [*found, r"\lfloor \pi^{100000} \rfloor", r"\lfloor e^{e^{10}} \rfloor", "1/0", "0/0"]


def _code(path: str) -> list[str]:
    codes = ["__import__('os').system('touch {}')", "__import__('os').system('touch {}') or 1"]
    codes += [
        r"\text{{__import__('os').system('touch {}')}}",
        "open('{}','w')",
        "exec(open('{}','w'))",
    ]
    codes += [
        "(lambda: open('{}','w'))()",
        'eval(\'open("{}","w")\')',
        "[open('{}','w') for x in 'a']",
    ]
    codes += [
        "\\write18{{touch {}}}",
        "\\input{{|touch {}}}",
        "`touch {}`",
        "$(touch {})",
        "; touch {}",
    ]
    codes += [
        "Symbol('x').__class__.__init__.__globals__['open']('{}','w')",
        'f\'{{open("{}","w")}}\'',
    ]
    codes += [
        "x.__class__.__mro__[1].__subclasses__()",
        "().__class__.__bases__",
        "globals()",
        "quit()",
    ]
    codes += [
        "1;import os;os.system('touch {}')",
        'sympify(\'open("{}","w")\')',
        "%(x)s{{0}}",
        "{{7*7}}",
    ]
    return [code.replace("{}", path).replace("{{", "{").replace("}}", "}") for code in codes]
