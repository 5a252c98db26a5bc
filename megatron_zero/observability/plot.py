"""A curve as text, for a terminal or a log: reward or accuracy over the steps of a run."""

import math
from collections.abc import Iterator, Sequence

# the bit of each dot in a braille cell of 2 x 4 dots, by [row][column]
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


def render_curve(
    values: Sequence[float | None],
    width: int = 72,
    height: int = 8,
    steps: tuple[int, int] | None = None,
) -> str:
    """Draw `values`, evenly spaced, as a line of dots; nan and None leave a gap.

    More values than dots are averaged. The highest and lowest value stand at the left, and the
    first and last step below.

    Args:
        values: one per step.
        width: characters per line, labels included; at least 20.
        height: lines of the plot, at least 2; one more line holds the axis.
        steps: of the first and the last value; None: 0 and `len(values) - 1`.

    Returns:
        `height + 1` lines, or one line saying so when there is nothing to draw.
    """
    assert width >= 20 and height >= 2, (width, height)
    finite = [v if v is not None and math.isfinite(v) else None for v in values]
    known = [v for v in finite if v is not None]
    if not known:
        return "(nothing to draw yet)"
    low, high = min(known), max(known)
    labels = [""] * height
    labels[0], labels[-1] = f"{high:.3g}", f"{low:.3g}"
    if low == high:
        labels = [f"{low:.3g}" if row == height // 2 else "" for row in range(height)]
    label_width = max(6, *map(len, labels))
    num_columns = width - label_width - 2
    cells = [[_BLANK] * num_columns for _ in range(height)]
    for x, y in _trace(_resample(finite, 2 * num_columns), low, high, 2 * num_columns, 4 * height):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    lines = [
        f"{label:>{label_width}} ┤{''.join(map(chr, row)).replace(chr(_BLANK), ' ')}".rstrip()
        for label, row in zip(labels, cells, strict=True)
    ]
    first, last = steps or (0, len(values) - 1)
    gap = max(num_columns - len(str(first)) - len(str(last)) - 2, 1)
    axis = f"{'step':>{label_width}} └ {first}{' ' * gap}{last}"
    return "\n".join([*lines, axis])


def _resample(values: list[float | None], limit: int) -> list[float | None]:
    """At most `limit` values: each the mean of what falls on it."""
    if len(values) <= limit:
        return values
    bins: list[list[float]] = [[] for _ in range(limit)]
    for i, value in enumerate(values):
        if value is not None:
            bins[i * limit // len(values)].append(value)
    return [math.fsum(v / len(b) for v in b) if b else None for b in bins]


def _trace(
    points: list[float | None], low: float, high: float, width: int, height: int
) -> Iterator[tuple[int, int]]:
    """The dots (x, y) of a line through `points`, y from the top; it has a gap at None."""
    before = None
    for i, point in enumerate(points):
        if point is None:
            before = None
            continue
        x = round(i * (width - 1) / max(len(points) - 1, 1))
        level = (point / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
        y = round((1 - level) * (height - 1))
        x0, y0 = before or (x, y)
        length = max(abs(x - x0), abs(y - y0), 1)
        for j in range(length + 1):
            yield round(x0 + (x - x0) * j / length), round(y0 + (y - y0) * j / length)
        before = (x, y)
