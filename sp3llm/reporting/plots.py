"""The pictures of a report, as SVG that goes straight into a page and takes its colours from it."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sp3llm.reporting.tables import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# matplotlib draws in these, and the page says what they are: it knows whether it is dark.
_INK, _FAINT, _ONE, _TWO, _FILL = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {
    _INK: "--ink",
    _FAINT: "--faint",
    _ONE: "--dense",
    _TWO: "--small",
    _FILL: "--fill",
}
# At this width, in points, letters have their own size on a phone.
_WIDTH, _HEIGHT = 360, 236
# Beyond, they would run into each other at that width.
_MOST_MARKERS = 80
_STYLE = {
    "svg.fonttype": "none",  # letters stay letters, in the page's font
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True)
class Line:
    """A line over the depth of a model."""

    label: str
    positions: Sequence[float]
    """In layers."""
    values: Sequence[float]
    is_refitted: bool
    """Drawn in the compressed model's colour, otherwise in the dense one's."""
    marker: str
    """matplotlib's; anything but `o` is dashed, too."""


def parts_plot(parts: Sequence[Part]) -> str:
    """Parameters by part, before and after, as SVG."""

    def draw(axes: "Axes") -> None:
        names = [part.name for part in parts]
        scale, unit = _unit(max(max(part.dense, part.small) for part in parts))
        at = range(len(parts))
        dense = [part.dense / scale for part in parts]
        small = [part.small / scale for part in parts]
        axes.barh([y - 0.2 for y in at], dense, 0.36, color=_ONE, label="dense")
        bars = axes.barh([y + 0.2 for y in at], small, 0.36, color=_TWO, label="compressed")
        axes.bar_label(bars, [part.kept for part in parts], padding=3, fontsize=9.5)
        axes.set_yticks(list(at), names)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlabel(f"{unit} parameters; labels: share kept")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")

    return _svg(draw, "Parameters by part, dense and compressed", "parts")


def _unit(largest: int) -> tuple[float, str]:
    for scale, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""


def spectrum_plot(eigenvalues: Sequence[float], kept: int) -> str:
    """Eigenvalues of the summed second moments, falling, and how many directions are kept."""

    def draw(axes: "Axes") -> None:
        total = sum(eigenvalues)
        shares = [max(value, 0.0) / total for value in eigenvalues]
        floor = max(min(filter(None, shares), default=1e-12), max(shares) * 1e-12)
        numbers = range(1, len(shares) + 1)
        shares = [max(share, floor) for share in shares]
        axes.axvspan(0.5, kept + 0.5, color=_FILL, linewidth=0)
        axes.plot(numbers, shares, color=_TWO, linewidth=1.8)
        axes.axvline(kept + 0.5, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(yscale="log", xlim=(0.5, len(shares) + 0.5))
        axes.set_xlabel("direction, by energy")
        axes.set_ylabel("share of the energy")
        left = kept > 0.7 * len(shares)
        axes.annotate(
            f"{kept} of {len(shares)}",
            (kept + 0.5, max(shares)),
            xytext=(-5 if left else 5, -4),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
        )

    return _svg(draw, f"Spectrum of the residual stream, {kept} directions kept", "spectrum")


def layers_plot(lines: Sequence[Line], ylabel: str, name: str, percent: bool = False) -> str:
    """Lines over the depth of the model, as SVG; `name` tells its ids from other pictures'."""

    def draw(axes: "Axes") -> None:
        for line in lines:
            axes.plot(
                line.positions,
                [100 * value for value in line.values] if percent else line.values,
                color=_TWO if line.is_refitted else _ONE,
                linestyle="-" if line.marker == "o" else (0, (4, 2)),
                marker=line.marker if len(line.positions) <= _MOST_MARKERS else None,
                markersize=3.2,
                linewidth=1.5,
                label=line.label,
            )
        axes.set_xlabel("layer")
        axes.set_ylabel(ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=2,
            handlelength=1.8,
            columnspacing=1.2,
        )

    return _svg(draw, f"{ylabel} over the layers", name)


def _svg(draw: Any, label: str, name: str) -> str:
    """A figure as an `<svg>` element: no width, no ids but those it refers to, colours by name."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        draw(figure.subplots())
        text = _drawn(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    for identifier in used:  # several figures share a page
        text = re.sub(rf'(?<=[#"]){re.escape(identifier)}(?=[)"])', f"{name}-{identifier}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _drawn(figure: "Figure") -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()
