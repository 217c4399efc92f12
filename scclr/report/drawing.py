"""How the figures of a report are drawn: one style, and from a figure to SVG and PNG.

Text and lines have the colour ``INK`` and the ground ``PAPER``, each with a name of its own in SVG, so that a page can
show them light or dark. Colours of data are those of Okabe and Ito, which colour-blind readers tell apart, or viridis.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER = "#1c2127", "#fffffe"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = ("o", "s", "^", "D", "v", "P")
MANY = 400  # points of a figure, beyond which they are pixels in SVG too
WIDE, DPI = 7.0, 144  # inches; pixels in one
STYLE: Any = {  # matplotlib's types name every key
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "scclr",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Picture:
    """A finished figure.

    Args:
        name: of its files.
        caption: what it shows, with n and what bars and bands are; plain text.
        svg, png: its two forms.
        wide: whether it takes the whole width of a page.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    wide: bool = False

    @property
    def inline(self) -> str:
        """The SVG as part of a page: it takes the page's colours and width, and its names are its own there."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text)
        text = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{self.name}-\2"', text)
        text = text.replace(INK, "currentColor").replace(PAPER, "none").replace("'DejaVu Sans'", "inherit")
        said = html.escape(f"{self.title}. {self.caption}", quote=True)
        return re.sub(
            r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{said}">', text, count=1
        )


@contextmanager
def style() -> Iterator[None]:
    """The style that figures are drawn in."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new(rows: int = 1, columns: int = 1, width: float = 5.4, height: float = 3.4) -> tuple["Figure", list["Axes"]]:
    """An empty figure of ``rows`` x ``columns`` panels; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def finish(figure: "Figure", name: str, title: str, caption: str) -> Picture:
    """Draw a figure in both forms."""
    vector, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(vector, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine(None)  # what it has placed stays there; placing takes longer than drawing
    figure.savefig(pixels, format="png", dpi=DPI)
    wide = figure.get_figwidth() > WIDE
    return Picture(name, title, caption, vector.getvalue(), pixels.getvalue(), wide)


def colour(number: int) -> str:
    """The colour of the series of this number; six differ."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """The marker of the series of this number."""
    return MARKERS[number % len(MARKERS)]


def scale(values: Sequence[float]) -> Any:
    """A map from numbers to colours of viridis, without the ends, which black and white grounds hide."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    kept = ListedColormap(colormaps["viridis"]([0.26 + 0.64 * step / 255 for step in range(256)]))
    return ScalarMappable(Normalize(min(values), max(values)), kept)


def edge(panel: "Axes", x: float, text: str) -> None:
    """A vertical line of the theory, with its name at the top."""
    panel.axvline(x, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.75)
    panel.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(2, -2), textcoords="offset points",
        rotation=90, va="top", ha="left", fontsize=7.5, color=INK,
    )  # fmt: skip
