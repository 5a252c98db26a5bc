r"""One spelling per construct: answers as strings, before anything is parsed.

Two levels. `clean` removes what carries no value (units, currency, degrees, percent signs, sizes
and spacing) and keeps LaTeX that `expression` can parse. `normalize` goes on to a canonical string:
equal strings are equal answers, which settles most gradings in microseconds and is all there is
for answers that are no formula (`\overline{CD}`, `two lines`).

The rules are those of the MATH string comparison every published number uses. All patterns are
linear or applied to at most `MAX_ANSWER_CHARS` characters.
"""

import re

MAX_ANSWER_CHARS = 2000  # longer answers are equal only to themselves; the longest gold has 204

_COMMANDS = "×times ·cdot ⋅cdot πpi √sqrt ∞infty ≤le ≥ge ≠ne ±pm ∪cup ∈in"
_UNICODE = {
    **str.maketrans("−–÷，（）\u00a0", "--/,() ", "°"),  # the last one is dropped
    **str.maketrans({"²": "^{2}", "³": "^{3}"}),
    **{ord(command[0]): f"\\{command[1:]} " for command in _COMMANDS.split()},
}

# 1{,}000 10,\!080 1\,000
_GROUPING = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!|\\[, ])\s*(?=\d{3}(?!\d))")
_SIZES = re.compile(
    r"\\(?:left|right)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|displaystyle|limits|phantom)(?![A-Za-z])"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:! ]|q?quad(?![A-Za-z]))|~|\s+")  # not \\ of a matrix
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\(?:degree|circ)(?![A-Za-z])")
_BOLD = re.compile(r"\\(?:mathbf|mathit|boldsymbol|bm|mathnormal)\s*\{([^{}]*)\}")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathsf|mbox|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_JOINING = re.compile(r"\s*,?\s*(?:and|or)\s*,?\s*", re.IGNORECASE)
_COMMAS = re.compile(r",(?:\s*,)+")  # of "2, 3, \text{ and } 4"
_CHOICE = re.compile(r"\([A-Za-z]\)")  # \text{(C)}
_FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp")
_POWERS_OF_TEN = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(rf"(?<=[\d}}])\s*(\\text\{{\s*)?({'|'.join(_POWERS_OF_TEN)})(?![A-Za-z])")
_TRAILING_TEXT = re.compile(r"(?:\\text\{[^{}]*\}\s*(?:\^\s*(?:\d|\{-?\d+\}))?[\s.,/]*)+$")
_NUMERIC = re.compile(r"\d|\\pi|\\sqrt")

# Names of units and of the things MATH counts; without plural s; no single letters, since 6m
# is a product.
_UNIT_NAMES = (
    "degree deg unit cm mm km dm nm kg mg lb oz ft yd mi mph kph rpm ml hr min sec inch inches "
    "foot feet yard mile meter metre centimeter millimeter kilometer acre gram kilogram pound "
    "ounce ton liter litre gallon quart second minute hour day week month year dollar cent euro "
    "usd penny pennies dime quarter nickel percent point people person student child children boy "
    "girl man men woman women way time page apple marble ball book car card coin cookie dog cat "
    "egg game integer number digit solution value sq-unit cube tile square triangle edge vertex "
    "vertices face side row ticket pencil piece box boxes radian knot joule watt volt newton hertz "
    "hz khz mhz kelvin"
)
_PLAIN_UNIT = re.compile(
    r"(?<=[\d})\s])(?:(?:square|cubic|sq\.?|cu\.?)\s*)?"
    rf"(?:{'|'.join(sorted(_UNIT_NAMES.split(), key=len, reverse=True))})s?"
    r"\.?(?:\s*\^\s*(?:\d|\{-?\d\}))?(?:\s*(?:per|/)\s*[A-Za-z]+)?\s*$",
    re.IGNORECASE,
)

_LEFT_SIDE = re.compile(r"(?:[A-Za-z]{1,2}|\\[A-Za-z]+|[A-Za-z]\([A-Za-z]\)|[A-Za-z]_\w)(?:=|\\in)")
_BARE_DECIMAL = re.compile(r"(?<![\d.])\.(?=\d)")
_SLASH = re.compile(r"(-?)(\d+)/(\d+)")


def clean(answer: str) -> str:
    r"""Remove what carries no value; what is left is LaTeX with one spelling per construct.

    Examples:
        "$\dfrac12$"                  -> "\frac12"
        "864 \mbox{ inches}^2"        -> "864"
        "2\text{ and }3"              -> "2,3"
        "\$32,\!348"               -> "32348"
        "\text{even}"                -> "\text{even}"
    """
    text = answer.translate(_UNICODE).replace("\\$", "").replace("$", "")
    text = text.replace("\\%", "").replace("%", "")
    text = _GROUPING.sub("", text)
    text = _FRACTIONS.sub(r"\\frac", _SIZES.sub("", text))
    text = _SPACES.sub(" ", _DEGREES.sub("", text))
    text = _TEXT.sub(_clean_text, _BOLD.sub(r" \1 ", text))
    text = _COMMAS.sub(",", _LARGE.sub(_power_of_ten, text)).strip()
    text = _without_units(text).rstrip(" .,;")
    return text.removeprefix("\\approx").strip()


def _clean_text(match: re.Match[str]) -> str:
    r"""`\text{…}` and its relatives: a separator, a function, a number or choice, or text."""
    body = match[1].strip()
    if _JOINING.fullmatch(body):
        return ","
    if _FUNCTIONS.fullmatch(body):
        return f"\\{body} "
    bare = not any(map(str.isalpha, body)) or _CHOICE.fullmatch(body)
    if bare or (match[0].startswith("\\mathrm") and match[1] in ("e", "i")):
        return f" {body} "
    return f"\\text{{{body}}}"


def _power_of_ten(match: re.Match[str]) -> str:
    opened = "\\text{" if match[1] else ""
    return f"\\cdot 10^{{{_POWERS_OF_TEN[match[2]]}}}{opened}"


def _without_units(text: str) -> str:
    """Drop trailing units, if something numeric is left that they could be units of."""
    for pattern in (_TRAILING_TEXT, _PLAIN_UNIT, _PLAIN_UNIT):
        match = pattern.search(text)
        if match and _NUMERIC.search(text, 0, match.start()):
            text = text[: match.start()].rstrip()
    return text


def normalize(cleaned: str) -> str:
    r"""The canonical string of a `clean` answer, for comparison only.

    Examples:
        "x = \frac12"       -> "\frac{1}{2}"
        "-1/2"               -> "-\frac{1}{2}"
        "\sqrt2"            -> "\sqrt{2}"
        ".5"                 -> "0.5"
        "2516_{8}"           -> "2516_8"
        "\text{two lines}"  -> "twolines"
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", cleaned)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)  # kept between two digits: 1 2/3 is not 12/3
    prefix = _LEFT_SIDE.match(text)
    if prefix and text.count("=") + text.count("\\in") - text.count("\\infty") == 1:
        text = text[prefix.end() :]
    text = re.sub(r"\\sqrt(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)", r"\\frac{\1}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = _BARE_DECIMAL.sub("0.", text)
    slash = _SLASH.fullmatch(text)
    return f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}" if slash else text
