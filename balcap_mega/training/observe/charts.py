"""Small line charts as inline SVG that takes its colours and its font from the page around it, light or dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

WIDTH, HEIGHT = 5.2, 2.3  # inches, of 72 SVG units
SMOOTHING = 12  # a curve's bold line averages a window of this fraction of the steps

# Matplotlib wants real colours: these stand for the page's CSS variables, which replace them in the finished SVG.
INK, GRID = "#010101", "#020202"
SERIES = tuple(f"#0300{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "--soft", GRID: "--line", **{hex_: f"--series-{n}" for n, hex_ in enumerate(SERIES, start=1)}}


@dataclass(frozen=True)
class Curve:
    """One line: its name in the legend and a value a step."""

    label: str
    values: Sequence[float]


def line_chart(
    steps: Sequence[int], curves: Sequence[Curve], *, band: tuple[float, float] | None = None, log: bool = False
) -> str:
    """Each curve faintly as it is and boldly as its moving average; `band` shades a range of values."""
    figure, axes = _axes(steps)
    axes.margins(y=0.12)
    if band is not None:
        axes.axhspan(*band, color=SERIES[0], alpha=0.1, linewidth=0)
    for curve, colour in zip(curves, SERIES):
        axes.plot(steps, curve.values, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, moving_average(curve.values), color=colour, linewidth=2, solid_capstyle="round")
    low, high = axes.dataLim.intervaly
    if low == high and not log:  # matplotlib would show a rate that stays 0 on an axis from -0.05 to 0.05
        axes.update_datalim([(steps[0], 0.0), (steps[0], 2 * low or 1.0)])
        axes.autoscale_view(scalex=False)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))  # so that some decade has its label
    return _svg(figure)


def stacked_chart(steps: Sequence[int], parts: Mapping[str, Sequence[float]]) -> str:
    """What a step's seconds were spent on, one layer a part."""
    figure, axes = _axes(steps)
    axes.stackplot(steps, *parts.values(), colors=SERIES[: len(parts)], alpha=0.75, linewidth=0)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def moving_average(values: Sequence[float]) -> np.ndarray:
    """Centred, over a window that shrinks towards both ends; [N] to [N]."""
    reach = max(len(values) // SMOOTHING // 2, 1)
    return np.array([np.mean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))])


def _axes(steps: Sequence[int]):
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
    axes = figure.subplots(subplot_kw={"facecolor": "none"})
    axes.set_xlim(steps[0] - 0.5 * (len(steps) == 1), steps[-1] + 0.5 * (len(steps) == 1))
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=9, length=0, pad=5)
    axes.yaxis.get_offset_text().set_fontsize(9)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "balcap-mega"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<(style|metadata)\b.*?</\1>", "", svg, flags=re.DOTALL)  # its style would reach the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    return re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", svg)
