r"""One spelling per construct: answers as strings, before anything is parsed.

Two levels. `clean` removes what carries no value (currency, percent signs, sizes and spacing) or is
compared apart (units), and keeps LaTeX that `expression` can parse. `normalize` goes on to a
canonical string: equal strings are equal answers, which settles most gradings in microseconds and
is all there is for answers that are no formula (`\overline{CD}`, `two lines`, `4:30 pm`).

The rules begin with those of the MATH string comparison every published number uses; where they
would take one value for another they are narrower (docs/verifier.md). All patterns are linear or
applied to at most `MAX_ANSWER_CHARS` characters.
"""

import re
import tomllib
import unicodedata
from pathlib import Path
from typing import Optional

from megatron_zero.rewards.tokens import FUNCTIONS

MAX_ANSWER_CHARS = 2000  # longer answers are equal only to themselves; the longest gold has 204

_COMMANDS = "×times ·cdot ⋅cdot πpi √sqrt ∞infty ≤le ≥ge ≠ne ±pm ∪cup ∈in ∅emptyset θtheta ≡equiv"
_UNICODE = {
    **str.maketrans("−–÷⁄，（）\u00a0", "--//,() "),
    **{ord(command[0]): f"\\{command[1:]} " for command in _COMMANDS.split()},
    **{
        ord(c): "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split("⁄"))
        for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    },
    **{ord(c): f"^{{{digit}}}" for digit, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    ord("°"): "^\\circ ",
}
_SPELLINGS = tomllib.loads(Path(__file__).with_name("spellings.toml").read_text("utf-8"))
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS["rules"]]
_DEGREES = re.compile(
    r"(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\(?:degree|circ)(?![A-Za-z]))"
    r"(?:\s*(?:[CF](?![A-Za-z])|\\text\{\s*[CF]\s*\}))?"
)
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathsf|mbox|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_COMMAS = re.compile(r"(?i),\s*(?=and\b|or\b)")  # of "2, 3, \text{ and } 4"
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(rf"(?<=[\d}}])\s*(\\text\{{\s*)?({'|'.join(_POWERS_OF_TEN)})(?![A-Za-z])")

_POWER = r"(?:\s*\^\s*(?:\d|\{\s*-?\d+\s*\}))?+"
_UNIT_IN_TEXT = re.compile(rf"(?:\\text\{{[^{{}}]*\}}{_POWER}[\s.,/]*+)++$")
_PLAIN_UNIT = re.compile(
    rf"(?:(?<=[\d)}}])(?=[A-Za-z]{{2}})|(?<=[\d)}}\w])\s+)(?:[A-Za-z]++\.?{_POWER}[\s/]*+)++$"
)
_UNIT_PARTS = re.compile(r"[a-z]+|\^ *-? *\d+|/|\S")
_GROUPS = map(str.split, _SPELLINGS["measures"].split("|"))
_CANONICAL = {word: names[0] for names in _GROUPS for word in names}
_NOT_UNITS = re.compile(f"(?:{'|'.join(_SPELLINGS['not_units'].split())})s?")


def clean(answer: str) -> tuple[str, str]:
    r"""What is left when all that carries no value is removed, and the unit, "" if there is none.

    Examples:
        "$\dfrac12$"                -> "\frac12", ""
        "864 \mbox{ inches}^2"      -> "864", "inch^2"
        "2\text{ and }3"            -> "2,3", ""
        "\$32,\!348"                -> "32348", "dollar"
        "\text{even}"               -> "\text{even}", ""
    """
    signs = {"\\$": "dollar", "€": "euro", "£": "sterling"}
    unit = next((name for sign, name in signs.items() if sign in answer), "")
    text = answer.translate(_UNICODE)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _TEXT.sub(_clean_text, text)
    text = _DEGREES.sub("\\\\frac{\\\\pi}{180}" if _TRIGONOMETRIC.search(text) else " ", text)
    text = _COMMAS.sub("", _LARGE.sub(_power_of_ten, text)).rstrip(" .,;").lstrip()
    for pattern in (_UNIT_IN_TEXT, _PLAIN_UNIT):
        match = pattern.search(text)
        if match and re.search(r"\d|\\pi|\\sqrt", text[: match.start()]):
            name = _unit(match[0])
            if name is not None:
                text, unit = text[: match.start()], name or unit
    return text.rstrip(" .,;").removeprefix("\\approx").strip(), unit


def _clean_text(match: re.Match[str]) -> str:
    r"""`\text{…}` and its relatives: a separator, a function, a number or choice, or text."""
    body = match[1].strip()
    if body in FUNCTIONS:
        return f"\\{body} "
    bare = not any(map(str.isalpha, body)) or re.fullmatch(r"\([A-Za-z]\)", body)
    if bare or (match[0].startswith("\\mathrm") and match[1] in ("e", "i")):
        return f" {body} "
    return f"\\text{{{body}}}"


def _power_of_ten(match: re.Match[str]) -> str:
    opened = "\\text{" if match[1] else ""
    return f"\\cdot 10^{{{_POWERS_OF_TEN[match[2]]}}}{opened}"


def _unit(text: str) -> Optional[str]:
    """The canonical name of a unit, "" for counted things; None for text that is neither."""
    text = re.sub(r"\\text|[{}.,]", " ", text.lower())
    text = re.sub(r"\b(?:square|sq) +([a-z]+)", r"\1^2", text)
    parts = _UNIT_PARTS.findall(re.sub(r"\b(?:cubic|cu) +([a-z]+)", r"\1^3", text))
    names = []
    if any(_NOT_UNITS.fullmatch(part) for part in parts):
        return None
    for position, part in enumerate(parts):
        singular = part.removesuffix("s")
        measure = _CANONICAL.get(part) or _CANONICAL.get(singular)
        if part in ("per", "/") or part[0] == "^":
            names.append("/" if part == "per" else part.replace(" ", ""))
        elif measure:
            names.append(measure)
        elif len(part) < 4 or (singular == part and position == len(parts) - 1):
            return None
    return "".join(names).replace("#", "")


def normalize(cleaned: str) -> str:
    r"""The canonical string of a `clean` answer, for comparison only.

    Examples:
        "2516_{8}"           -> "2516_8"
        "\text{two lines}"  -> "twolines"
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", cleaned)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)  # kept between two digits: 1 2 is not 12
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
