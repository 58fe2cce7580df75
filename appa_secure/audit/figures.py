"""The audit's figures, in the style of the report's; SVG for the page, PNG to look at."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from appa_secure.audit.canaries import View
from appa_secure.audit.membership import Roc
from appa_secure.audit.reconstruction import Reconstruction
from appa_secure.report.plots import BLUE, FAINT, INK, MUTED, ORANGE, PALE, STYLE, WIDTH


def _draw(height: float, panels: Sequence[Callable[[Axes], None]]) -> tuple[str, bytes]:
    """(SVG, PNG) of panels side by side."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH * (1.0 if len(panels) == 1 else 1.6), height), layout="constrained")
        for number, paint in enumerate(panels):
            paint(figure.add_subplot(1, len(panels), number + 1))
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def bounds(views: Sequence[View]) -> tuple[str, bytes]:
    """Claimed epsilon (bar), measured lower bounds (dot, diamond), and what the dot could have been at most (line)."""

    def paint(axes: Axes) -> None:
        top = max(max(v.claimed, v.measured, v.bound.ceiling) for v in views)
        for row, v in enumerate(reversed(views)):
            colour = ORANGE if v.exceeded else BLUE
            axes.barh(row, v.claimed, height=0.42, color=PALE, zorder=1)
            axes.plot([v.bound.ceiling] * 2, [row - 0.3, row + 0.3], color=MUTED, linewidth=1.2, zorder=2)
            axes.plot(v.bound.epsilon, row, "o", color=colour, markersize=8, zorder=3)
            if v.gaussian is not None:
                axes.plot(
                    v.gaussian[0],
                    row,
                    "D",
                    color=colour,
                    markersize=7,
                    fillstyle="none",
                    zorder=3,
                    clip_on=False,
                )
            axes.annotate(
                f"claimed ≤ {v.claimed:.2f}, measured ≥ {v.measured:.2f}", (0, row + 0.34), color=colour, fontsize=9,
                va="bottom",
            )  # fmt: skip
        axes.set_yticks(range(len(views)), [v.name for v in reversed(views)])
        axes.tick_params(axis="y", length=0, pad=8)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 1.05 * top)
        axes.set_ylim(-0.5, len(views) - 0.2)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(
            "ε  (bar: claimed; dot: any mechanism, line: its most;\ndiamond: Gaussian, clients independent)"
        )

    return _draw(1.1 + 0.62 * len(views), [paint])


def rocs(title: str, curves: Mapping[str, Roc]) -> tuple[str, bytes]:
    """Membership inference: true against false positives, with and without privacy."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=":")
        signs = ((BLUE, "-"), (ORANGE, "--"))
        for number, ((name, r), (colour, dash)) in enumerate(zip(curves.items(), signs, strict=False)):
            axes.plot(r.false, r.true, color=colour, linestyle=dash)
            axes.annotate(
                f"{name}: AUC {r.auc:.2f} ({r.low:.2f} to {r.high:.2f})", (0.98, 0.14 - 0.1 * number),
                ha="right", color=colour, fontsize=9,
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("answers that were not in, called in")
        axes.set_ylabel("answers that were in, called in")
        axes.set_title(title, loc="left", fontsize=10, color=INK)

    return _draw(WIDTH * 0.86, [paint])


def contexts(found: Mapping[str, Reconstruction]) -> tuple[str, bytes]:
    """Errors of the reconstructed counts with the raw and with the private context."""
    reach = max(1.5, float(np.quantile(np.abs(found["private"].errors), 0.95)))
    edges = np.arange(-np.ceil(reach) - 0.5, np.ceil(reach) + 1.5)

    def panel(name: str, colour: str) -> Callable[[Axes], None]:
        r = found[name]

        def paint(axes: Axes) -> None:
            low, high = r.interval
            axes.hist(np.clip(r.errors, edges[0], edges[-1]), bins=edges.tolist(), color=colour, density=True)
            axes.set_xlabel("reconstructed minus true count")
            axes.yaxis.set_visible(False)
            axes.spines["left"].set_visible(False)
            axes.set_title(
                f"{name} context: {r.exact:.0%} of counts exact;\none more person found in "
                f"{r.hits / len(r.more):.0%} ({low:.0%} to {high:.0%})",
                loc="left", fontsize=9.5, color=INK,
            )  # fmt: skip

        return paint

    return _draw(2.6, [panel("raw", ORANGE), panel("private", BLUE)])
