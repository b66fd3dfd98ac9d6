"""Figures as inline SVG and HTML: one drawing for light and dark, colours from the page's style.

Text and marks take their colour from CSS variables, so the same markup serves both themes and
print. Only heat maps are bitmaps. Everything that comes from a trace is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from moeprof.reporting import heatmaps
from moeprof.reporting.layout import FigureData
from moeprof.reporting.numbers import compact, formatted

WIDTH = 360
HEIGHT = 236
LEFT = 46
RIGHT = 12
TOP = 10
BOTTOM = 40

_MAX_X_LABELS = 13
_INLINE_LABEL_SHARE = 0.085
_MAX_POWERS = 9
_NUM_TICKS = 4
_NEAR_ZERO = 0.2
_FINE = 256
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_BINARY_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def drawn(figure: FigureData) -> Markup:
    """Returns the markup of a figure's panels, key included."""
    return _KINDS[figure["kind"]](figure)


def _key(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Returns a legend of (class of the swatch, its kind, label)."""
    entries = Markup("").join(
        Markup('<li><span class="swatch {} s-{}"></span>{}</li>').format(kind, key, label)
        for key, kind, label in dict.fromkeys(items)
    )
    return Markup('<ul class="key">{}</ul>').format(entries)


def _bars(figure: FigureData) -> Markup:
    rows = Markup("")
    items: list[tuple[str, str, str]] = []
    bars = figure["panels"][0]["rows"]
    for row in bars:
        segments = Markup("")
        for segment in row["segments"]:
            share = segment["share"] or 0.0
            if share <= 0:
                continue
            items.append((segment["key"], "block", segment["label"]))
            value = formatted(segment["value"], segment["unit"])
            words = f"{segment['label']}: {formatted(share, 'share')}, {value}"
            by_value = segment["unit"] == "bytes" or row.get("by_value", False)
            if by_value:
                words = f"{segment['label']}: {value}"
            inline = (
                (value if by_value else formatted(share, "share"))
                if share >= _INLINE_LABEL_SHARE
                else ""
            )
            segments += Markup(
                '<span class="segment s-{}" style="width:{}%" title="{}"><b>{}</b></span>'
            ).format(segment["key"], f"{100 * share:.3f}", words, inline)
        note = row.get("value_note", "")
        value = formatted(row.get("value"), row.get("unit", ""))
        rows += Markup(
            '<div class="bar-row"><div class="bar-label"><strong>{}</strong>'
            "<span>{}{}</span></div>"
            '<div class="bar">{}</div></div>'
        ).format(row["label"], value, f" {note}" if note else "", segments)
    order = _merged([[part["key"] for part in row["segments"]] for row in bars])
    items.sort(key=lambda item: order.index(item[0]))
    return Markup('<div class="bars">{}</div>{}').format(rows, _key(items))


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Returns every name once, each behind the one it follows in the list that brought it."""
    merged: list[str] = []
    for names in lists:
        for index, name in enumerate(names):
            if name not in merged:
                merged.insert(merged.index(names[index - 1]) + 1 if index else 0, name)
    return merged


def _meters(figure: FigureData) -> Markup:
    rows = figure["panels"][0]["rows"]
    largest = max((row["high"] or row["value"] or 0.0 for row in rows), default=1.0) or 1.0
    drawn_rows = Markup("")
    for row in rows:
        value = row["value"] or 0.0
        whisker = Markup("")
        if row["low"] is not None and row["high"] is not None:
            whisker = Markup('<i class="whisker" style="left:{}%;width:{}%"></i>').format(
                f"{100 * row['low'] / largest:.2f}",
                f"{100 * (row['high'] - row['low']) / largest:.2f}",
            )
        drawn_rows += Markup(
            '<div class="meter"><span class="meter-label">{}</span>'
            '<span class="track"><span class="fill s-{}" style="width:{}%"></span>{}</span>'
            '<span class="meter-value">{}</span></div>'
        ).format(
            row["label"], row["key"], f"{100 * value / largest:.2f}", whisker,
            formatted(row["value"], row["unit"]),
        )  # fmt: skip
    return Markup('<div class="meters">{}</div>').format(drawn_rows)


def _lines(figure: FigureData) -> Markup:
    panels = Markup("").join(_line_panel(panel, figure["alt"]) for panel in figure["panels"])
    items = [
        (series["key"], "dot" if series.get("marks") else "line", series["label"])
        for panel in figure["panels"]
        for series in panel["series"]
        if series["points"]
    ]
    return Markup('<div class="panels">{}</div>{}').format(panels, _key(items))


def _line_panel(panel: dict[str, Any], alt: str) -> Markup:
    points = [point for series in panel["series"] for point in series["points"]]
    largest_y = max(
        (value for point in points for value in (point[1], point[3]) if value is not None),
        default=1.0,
    )
    xs = [point[0] for point in points]
    log = panel["x_scale"] == "log2"
    place_x, x_ticks = (_log_axis if log else _linear_axis)(xs)
    place_y, y_ticks = _value_axis(panel.get("y_max", largest_y), panel["y_unit"])
    body = _grid(y_ticks, place_y, panel["y_unit"])
    for x in x_ticks:
        body += Markup('<text x="{}" y="{}" class="tick" text-anchor="middle">{}</text>').format(
            _px(place_x(x)), HEIGHT - BOTTOM + 15, compact(x)
        )
    for series in panel["series"]:
        ranged = [point for point in series["points"] if point[2] is not None]
        for band in _unbroken(ranged, panel.get("gap")):
            if len(band) == 1:
                continue
            edge = [f"{_px(place_x(p[0]))},{_px(place_y(p[3]))}" for p in band]
            edge += [f"{_px(place_x(p[0]))},{_px(place_y(p[2]))}" for p in reversed(band)]
            body += Markup('<polygon class="band s-{}" points="{}"/>').format(
                series["key"], " ".join(edge)
            )
    for series in reversed(panel["series"]):
        if series.get("marks"):
            continue
        for part in _unbroken(series["points"], panel.get("gap")):
            path = " ".join(f"{_px(place_x(p[0]))},{_px(place_y(p[1]))}" for p in part)
            body += Markup('<polyline class="curve s-{}" points="{}"/>').format(series["key"], path)
    for series in panel["series"]:
        if series.get("marks"):
            for point in series["points"]:
                body += Markup('<circle class="mark s-{}" cx="{}" cy="{}" r="3.2"/>').format(
                    series["key"], _px(place_x(point[0])), _px(place_y(point[1]))
                )
    return _panel(panel, body, alt)


def _unbroken(
    points: Sequence[Sequence[Any]], gap: Sequence[float] | None
) -> list[list[Sequence[Any]]]:
    """Returns the points of a line on either side of a gap that it must not cross."""
    if gap is None:
        return [list(points)] if points else []
    sides = [p for p in points if p[0] <= gap[0]], [p for p in points if p[0] >= gap[1]]
    return [side for side in sides if side]


def _layers(figure: FigureData) -> Markup:
    panels = Markup("").join(_layer_panel(panel, figure["alt"]) for panel in figure["panels"])
    items = [
        (series["key"], "ring" if series["key"] == "uniform" else "dot", series["label"])
        for panel in figure["panels"]
        for series in panel["series"]
    ]
    return Markup('<div class="panels">{}</div>{}').format(panels, _key(items))


def _layer_panel(panel: dict[str, Any], alt: str) -> Markup:
    categories = panel["categories"]
    values = [
        value
        for series in panel["series"]
        for column in (series["values"], series["high"] or [])
        for value in column
        if value is not None
    ]
    place_y, y_ticks = _value_axis(max(values, default=1.0), panel["y_unit"])
    width = (WIDTH - LEFT - RIGHT) / max(len(categories), 1)
    body = _grid(y_ticks, place_y, panel["y_unit"])
    every = -(-len(categories) // _MAX_X_LABELS)
    for index, name in enumerate(categories):
        if index % every == 0:
            body += Markup(
                '<text x="{}" y="{}" class="tick" text-anchor="middle">{}</text>'
            ).format(_px(LEFT + width * (index + 0.5)), HEIGHT - BOTTOM + 15, name)
    solid = [series for series in panel["series"] if series["key"] != "uniform"]
    spread = min(width / (len(solid) + 1), 9.0)
    for series in panel["series"]:
        for index, value in enumerate(series["values"]):
            if value is None:
                continue
            beside = [other for other in solid if other["values"][index] is not None]
            shift = 0.0
            if series in beside:
                shift = spread * (beside.index(series) - (len(beside) - 1) / 2)
            x = LEFT + width * (index + 0.5) + shift
            if series["low"] and series["low"][index] is not None:
                body += Markup(
                    '<line class="whisker s-{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                ).format(
                    series["key"], _px(x), _px(x),
                    _px(place_y(series["low"][index])), _px(place_y(series["high"][index])),
                )  # fmt: skip
            shape = "ring" if series["key"] == "uniform" else "mark"
            body += Markup(
                '<circle class="{} s-{}" cx="{}" cy="{}" r="3.6"><title>{}</title></circle>'
            ).format(
                shape, series["key"], _px(x), _px(place_y(value)),
                f"{series['label']}, {panel.get('category', 'layer')} {categories[index]}: "
                f"{formatted(value, panel['y_unit'])}",
            )  # fmt: skip
    return _panel(panel, body, alt)


def _panel(panel: dict[str, Any], body: Markup, alt: str) -> Markup:
    label = f"{panel['title']}. {alt}"
    axis = Markup(
        '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<text x="{}" y="{}" class="axis-label" text-anchor="middle">{}</text>'
    ).format(
        LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM,
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, panel["x_label"],
    )  # fmt: skip
    return Markup(
        '<div class="panel"><h5>{}<span>{}</span></h5>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg></div>'
    ).format(panel["title"], panel["y_label"], WIDTH, HEIGHT, label, body, axis)


def _grid(ticks: Sequence[float], place: Callable[[float], float], unit: str) -> Markup:
    body = Markup("")
    for tick in ticks:
        y = _px(place(tick))
        body += Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text x="{}" y="{}" class="tick" text-anchor="end">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, _px(place(tick) + 3.5), _tick(tick, unit))
    return body


def _tick(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:g}%"
    return formatted(value, unit) if value else "0"


def _value_axis(largest: float, unit: str) -> tuple[Callable[[float], float], Sequence[float]]:
    """Returns where a value lies and the ticks, from zero to a round number above the largest."""
    largest = largest or 1.0
    if unit == "bytes":
        scale = 2.0 ** (10 * math.floor(math.log2(max(largest, 1)) / 10))
        step = next(step * scale for step in _BINARY_STEPS if step * scale * _NUM_TICKS >= largest)
    else:
        scale = 10.0 ** math.floor(math.log10(largest / _NUM_TICKS))
        step = next(
            step * scale for step in _TICK_STEPS if step * scale * _NUM_TICKS >= largest * 0.999
        )
    count = math.ceil(largest / step - 1e-3)
    top = step * count
    height = HEIGHT - TOP - BOTTOM
    return (
        lambda value: TOP + height * (1 - min(value / top, 1.02)),
        [step * index for index in range(count + 1)],
    )


def _log_axis(xs: Sequence[float]) -> tuple[Callable[[float], float], Sequence[float]]:
    low = math.floor(math.log2(max(min(xs, default=1.0), 1.0)))
    high = max(math.ceil(math.log2(max(xs, default=2.0)) - 1e-9), low + 1)
    width = WIDTH - LEFT - RIGHT - 10
    every = 2 if high - low > _MAX_POWERS else 1
    return (
        lambda x: LEFT + 5 + width * (math.log2(max(x, 1.0)) - low) / (high - low),
        [2.0**power for power in range(high, low - 1, -every)][::-1],
    )


def _linear_axis(xs: Sequence[float]) -> tuple[Callable[[float], float], Sequence[float]]:
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    low = 0.0 if 0 < low < _NEAR_ZERO * high else low
    span = (high - low) or 1.0
    scale = 10.0 ** math.floor(math.log10(span / _NUM_TICKS))
    step = next(step * scale for step in _TICK_STEPS if step * scale * (_NUM_TICKS + 1) >= span)
    width = WIDTH - LEFT - RIGHT - 10
    first = math.ceil(low / step)
    last = math.floor(high / step + 1e-9)
    return (
        lambda x: LEFT + 5 + width * (x - low) / span,
        [step * index for index in range(first, last + 1)],
    )


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _heat(figure: FigureData) -> Markup:
    """Returns one bitmap per panel; all panels of a figure share one scale."""
    scale = heatmaps.scale_of(figure["panels"])
    body = Markup("")
    for panel in figure["panels"]:
        image = heatmaps.data_uri(panel, scale)
        rows = panel["rows"]
        named = panel["row_axis"] != "steps"
        labels = Markup("").join(Markup("<span>{}</span>").format(name) for name in rows)
        axis = (
            Markup('<div class="heat-rows">{}</div>').format(labels)
            if named
            else Markup('<div class="heat-time"><span>first</span><span>last step</span></div>')
        )
        body += Markup(
            '<div class="panel heat{}"><h5>{}<span>{} experts, top-{}</span></h5>'
            '<div class="heat-body" style="--rows:{}">{}<img alt="{}" src="{}"></div>'
            '<div class="heat-x"><span>expert 0</span><span>{}</span></div></div>'
        ).format(
            (" named" if named else "") + (" fine" if panel["num_experts"] > _FINE else ""),
            panel["title"], panel["num_experts"], panel["top_k"],
            len(rows), axis, f"{panel['title']}: {figure['alt']}", image,
            panel["num_experts"] - 1,
        )  # fmt: skip
    ticks = Markup("").join(
        Markup('<span style="left:{}%">{}</span>').format(f"{100 * at:.2f}", text)
        for at, text in heatmaps.legend_ticks(figure["panels"], scale)
    )
    legend = Markup(
        '<div class="ramp"><div class="ramp-bar" style="background:{}"></div>'
        '<div class="ramp-ticks">{}</div><p>share of tokens that went to the expert</p></div>'
    ).format(heatmaps.gradient(), ticks)
    return Markup('<div class="panels heats">{}</div>{}').format(body, legend)


_KINDS: dict[str, Callable[[FigureData], Markup]] = {
    "bars": _bars,
    "meters": _meters,
    "lines": _lines,
    "layers": _layers,
    "heat": _heat,
}
