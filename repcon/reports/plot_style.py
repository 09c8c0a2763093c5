"""The look of the plots: a style per series name, and matplotlib's SVG as an element in the page's colours.

Colours are drawn as placeholders and replaced by CSS variables, so that one picture serves light and dark pages and
print. matplotlib is imported only when a plot is drawn.
"""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 9))
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")

LIGHT = {
    "ink": "#1c2330", "muted": "#5b6474", "grid": "#dfe3ea", "paper": "#ffffff",
    "s1": "#2563c9", "s2": "#d1570f", "s3": "#0f8a5f", "s4": "#9a3fae",
    "s5": "#a87900", "s6": "#0b8aa3", "s7": "#c43150", "s8": "#687385",
}  # fmt: skip
DARK = {
    "ink": "#e7eaf0", "muted": "#a2abba", "grid": "#343c4a", "paper": "#171b22",
    "s1": "#79adff", "s2": "#ff9a5f", "s3": "#4fcf9f", "s4": "#d993ea",
    "s5": "#e5b84b", "s6": "#4cc6dd", "s7": "#ff8b9d", "s8": "#a9b3c4",
}  # fmt: skip

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"s{number}" for number, colour in enumerate(SERIES, 1)
}
_RC: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 8.5, "axes.titlelocation": "left", "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 8,
    "figure.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.5,
}  # fmt: skip
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesStyle:
    """Colour, marker and dash of one series."""

    color: str
    marker: str
    dash: Any


class SeriesStyles:
    """A style per name, the same wherever the name is drawn; names get theirs in the order in which they are asked for.

    The first 64 differ in colour or marker, and of lines without markers the first 32 in colour or dash.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __getitem__(self, name: str) -> SeriesStyle:
        number = self._numbers.setdefault(name, len(self._numbers))
        turn, place = divmod(number, len(SERIES))
        marker = _MARKERS[(place + turn) % len(_MARKERS)]
        return SeriesStyle(color=SERIES[place], marker=marker, dash=_DASHES[turn % len(_DASHES)])


def styled(name: str) -> Any:
    """A context in which the figure of this name is made and saved; the ids in its SVG are of this name alone."""
    import matplotlib

    return matplotlib.rc_context(rc=cast(Any, _RC | {"svg.hashsalt": name}))


def svg(figure: "Figure", description: str) -> str:
    """The figure as an SVG element for an HTML page: no fixed size, text as text, colours as CSS variables."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # text stays text, so the viewer's fonts matter and not matplotlib's
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for part in (*root.findall(f"{{{_SVG}}}metadata"), *root.findall(f"{{{_SVG}}}defs")[:1]):
        root.remove(part)  # the first definitions hold a style for every element of the page
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)  # `axes_1` in every plot
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"class": "plot", "viewBox": box, "role": "img", "aria-label": description}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    text = ElementTree.tostring(root, encoding="unicode")
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text


def standalone(element: str) -> str:
    """The same picture as a file of its own, which follows its viewer's light or dark preference."""
    rules = (
        f"<style>svg{{{variables(LIGHT)}}} .plot *{{stroke-linejoin:round}}"
        ".plot text{font-family:system-ui,sans-serif !important}"
        f"@media (prefers-color-scheme: dark){{svg{{{variables(DARK)}}}}}</style>"
    )
    start = element.index(">") + 1
    return element[:start] + rules + element[start:] + "\n"


def variables(theme: dict[str, str]) -> str:
    """The theme as CSS custom properties."""
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())
