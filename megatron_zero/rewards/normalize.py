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
import unicodedata
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
# In this order, on the whole answer.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?s)^\\boxed\{(.*)\}$", r"\1"),
        (r"(?i)\\(?:text|mbox|mathrm)[a-z]*\s*\{[\s,]*(and|or)[\s,]*\}", r" \1 "),
        (r"^\\[(\[]|\\[)\]](?=[\s.,]*$)", ""),
        (r"\\\$|[$€£]|(?<=[\d}).$ ])\\?%(?![\w\\({^])|\bpercent\b", ""),
        (r"(?<=\d)(?:\{,\}|,\s*\\!|\\[, ])\s*(?=\d{3}(?!\d))", ""),  # 1{,}000 10,\!080 1\,000
        (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
        (r"\\(?:(?:left|right)\b\.?|(?:[bB]igg?[lrm]?|displaystyle|limits)(?![A-Za-z]))", ""),
        (r"\\[dtc](frac|binom)(?![A-Za-z])", r"\\\1"),
        (r"(\\\\)\[\d+\s*[a-z]+\]", r"\1"),  # \\[4pt]
        (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![A-Za-z]))|~|\s+", " "),  # not \\ of a matrix
        (r"\\(begin|end)\{(?:[pbB]?(?:small)?matrix|array)\}", r"\\\1 "),
        (r"(\\begin )\s*\{[lcr| ]+\}", r"\1"),
        (r"\\(?:mathbf|mathit|boldsymbol|bm|mathnormal)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(frac|binom) ?(\d)", r"\\\1{\2}"),
        (r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
        (r"\\sqrt ?(\d+)", r"\\sqrt{\1}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"(?<![\w.^}])(\d+) ?(\\frac ?\{\d+\} ?\{\d+\})", r"(\1+\2)"),  # mixed numbers
        (r"(?<![\w.^}])(\d+) +(\d+)/(\d+)(?![\w.])", r"(\1+\\frac{\2}{\3})"),
        (r"\\mathbb\s*(?:\{R\}|R)|ℝ", r"(-\\infty,\\infty)"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\\{ ?[a-z] ?(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x > 2}
        (r"\\(?:pmod|bmod|mod)(?![A-Za-z])", r"\\mod "),
        (r"\( ?(?:\\?mod|\\text\{ ?mod ?\}) ([^()]*)\)", r"\\mod \1"),
        (r"\\\{ ?\\\}", r"\\emptyset "),
        (r"(?i)(?<=:\d\d)\s*(?:\\text\{\s*([ap])\.?m\.?\s*\}|([ap])\.?m\b\.?)", r"\1\2m"),
        (r"\.\.\.|…", r"\\ldots "),
    )
)
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
# Of each group the first is the name by which units are compared; all without plural s. Of the last
# two groups, counted things that are no plural in s and what goes with units, there is no name.
_MEASURES = """
cm centimeter centimetre|m meter metre|mm millimeter|km kilometer kilometre|nm|dm|inch in inches|
foot ft feet|yard yd|mile mi|acre|g gm gram|kg kilogram|mg milligram|lb pound|ounce oz|ton|second s
sec|minute min|hour hr h|day|week|month|year yr|degree deg|radian rad|knot|dollar usd|cent penny
pennies|euro|l liter litre|ml milliliter|gallon gal|quart|cup|mile/hour mph|km/hour kph kmph|rpm|
joule j|kj|cal|kcal|watt w|kw|volt v|newton n|hertz hz|khz|mhz|kelvin k|ev|mol|pa|kpa|atm|bar|amp|
ohm|erg|# unit point person people student child children boy girl man men woman women way time page
apple ball book car coin cookie dog cat game integer number digit solution value tile vertex side
vertices row piece box mice sheep fish of the each
"""
_CANONICAL = {
    word: names[0] for group in _MEASURES.split("|") if (names := group.split()) for word in names
}
# Words that change the value, or that another answer may hide behind.
_NOT_UNITS = re.compile(
    r"(?:or|and|not?|if|is|but|than|less|more|minus|plus|times|over|under|negative|below|maybe|either"
    r"|except|equals|this|was|squared|cubed|half|halve|double|triple|twice|factorial|inverse|root"
    r"|third|(?!month).*th|ten|dozen|score|hundred|thousand|[mbtr]+illion|pair|one|two|three|four|five|six"
    r"|seven|eight|nine|zero|pi|base)s?"
)


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
