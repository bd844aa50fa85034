"""Curves as SVG pictures, and train.py's page of them."""

import html
import math

from common import complete, read_jsonl

SVG = "http://www.w3.org/2000/svg"
# Ten: progress.html draws a curve for each tenth of t.
CURVE_COLORS = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099",
                "#0099c6", "#dd4477", "#66aa00", "#8b4513", "#333333"]


def line_chart(series, x_label, y_label, log=False, width=720, height=300):
    """Return curves as an SVG picture, ready to stand in an HTML page or alone in a file.

    series: {name: [(x, y), ...]}, the points of each curve in order of x. Points that are not
    finite (or, on a logarithmic axis, not positive) are left out; a curve of one point is
    drawn as a dot. `log` makes the y axis logarithmic.
    """
    curves = {}
    for name, points in series.items():
        curves[name] = [point for point in points if can_be_drawn(*point, log)]
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    if not xs:
        return f'<svg xmlns="{SVG}" width="{width}" height="20"></svg>'

    # On a logarithmic axis the picture is drawn of log10(y).
    height_of = math.log10 if log else float
    x_low, x_high = axis_ends(min(xs), max(xs))
    y_low, y_high = axis_ends(height_of(min(ys)), height_of(max(ys)))
    left, right, top, bottom = 72, width - 16, 12, height - 42

    def column(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def row(y):
        return bottom - (height_of(y) - y_low) / (y_high - y_low) * (bottom - top)

    parts = [f'<svg xmlns="{SVG}" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
             f'<rect width="{width}" height="{height}" fill="white"/>']

    # Round numbers along both axes, with a thin line across the picture for each height.
    for x in round_ticks(x_low, x_high):
        parts.append(f'<text x="{column(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in (log_ticks(y_low, y_high) if log else round_ticks(y_low, y_high)):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{row(y):.1f}" y2="{row(y):.1f}" '
                     f'stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{row(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">'
                 f'{html.escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {(top + bottom) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{html.escape(y_label)}</text>')

    # The curves, and a legend in the upper right corner.
    for k, (name, points) in enumerate(curves.items()):
        color = CURVE_COLORS[k % len(CURVE_COLORS)]
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{column(x):.1f}" cy="{row(y):.1f}" r="3" fill="{color}"/>')
        corners = " ".join(f"{column(x):.1f},{row(y):.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" '
                     f'points="{corners}"/>')
        parts.append(f'<text x="{right - 4}" y="{top + 12 + 14 * k}" text-anchor="end" '
                     f'fill="{color}">{html.escape(name)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)


def can_be_drawn(x, y, log):
    """Tell whether a point has a place on the chart: finite, and positive if `log`."""
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)


def axis_ends(low, high):
    """Return where an axis begins and ends, also where all the values on it are one."""
    if low < high:
        return low, high
    margin = 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def round_ticks(low, high, most=6):
    """Return at most `most` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [k * step for k in range(first, last + 1)]


def log_ticks(low, high):
    """Return round numbers between 10^low and 10^high, some three to eight of them."""
    ticks = []
    decades = high - low
    if decades > 4:
        digits = [1]
    elif decades > 1:
        digits = [1, 2, 5]
    else:
        digits = range(1, 10)
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        ticks += [digit * 10.0 ** exponent for digit in digits]
    inside = [tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9]
    # A curve that hardly moves lies between two such numbers: then as on a plain axis.
    return inside if len(inside) >= 2 else round_ticks(10 ** low, 10 ** high)


def draw_progress(out):
    """Draw OUT/progress.html from the log: losses, the learning rate, the latest grid."""
    rows = read_jsonl(out / "log.jsonl")
    trained = [row for row in rows if "loss" in row]
    measured = [row for row in rows if "val_loss" in row]
    losses = {"training": [(row["step"], row["loss"]) for row in trained]}
    charts = {}
    if measured:
        losses["validation"] = [(row["step"], row["val_loss"]) for row in measured]
        bins = {}
        for k in range(10):
            points = [(row["step"], row["val_bins"][k]) for row in measured]
            bins[f"t from {k / 10} to {(k + 1) / 10:.1f}"] = points
        charts["Validation loss by time"] = line_chart(bins, "step", "loss", log=True)
    charts["Loss"] = line_chart(losses, "step", "mean squared error of the noise", log=True)
    rates = {"learning rate": [(row["step"], row["lr"]) for row in trained]}
    charts["Learning rate"] = line_chart(rates, "step", "learning rate")
    parts = ["<!doctype html><meta charset='utf-8'><body style='font-family: sans-serif'>"]
    for title, chart in charts.items():
        parts.append(f"<h2>{title}</h2>\n{chart}")
    for grid in sorted((out / "samples").glob("*.png"))[-1:]:
        parts.append(f"<h2>Samples: {grid.name}</h2>\n<img src='samples/{grid.name}'>")
    with complete(out / "progress.html") as path:
        path.write_text("\n".join(parts) + "\n", encoding="utf-8")
