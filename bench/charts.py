"""Line charts as SVG: little enough that benches need no plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 60, 170, 40, 45
# Told apart by those who don't see all colours. Source: Okabe and Ito, Color universal design, 2008.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
Line = Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Line], *, is_log: bool = False) -> str:
    """An SVG document; with `is_log` the y axis is logarithmic."""
    points = [point for line in lines.values() for point in line]
    x = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT, is_log=False)
    y = _Axis([p[1] for p in points] + ([] if is_log else [0.0]), HEIGHT - BOTTOM, TOP, is_log=is_log)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 18, title, size=15),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, anchor="middle"),
        _text(LEFT, TOP - 4, y_label),
    ]
    places = sorted({p[0] for p in points})
    parts += [_text(x.at(value), HEIGHT - BOTTOM + 16, f"{value:g}", anchor="middle") for value in places]
    for value in y.ticks():
        parts.append(f'<path d="M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y.at(value) + 4, f"{value:g}", anchor="end"))
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = "L".join(f"{x.at(px):.1f} {y.at(py):.1f}" for px, py in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3" fill="{colour}"/>' for px, py in line]
        height = TOP + 12 + 20 * index
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {height - 4}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(WIDTH - RIGHT + 36, height, name))
    return "\n".join([*parts, "</svg>\n"])


class _Axis:
    """From values to places on the paper."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_log: bool) -> None:
        self._is_log = is_log
        self._low, self._high = self._scaled(min(values)), self._scaled(max(values))
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        return self._start + (self._end - self._start) * (self._scaled(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if self._is_log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        else:
            step = 10 ** math.floor(math.log10(self._high - self._low))
            step *= next(f for f in (0.1, 0.2, 0.5, 1, 2) if (self._high - self._low) / (f * step) <= 8)
            values = [step * n for n in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]
        return [value for value in values if self._low <= self._scaled(value) <= self._high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._is_log else value


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
