"""How a plot becomes part of a page: matplotlib's SVG with the page's colours, its own ids and no fixed size.

Colours are drawn as placeholders and replaced by CSS variables, so that one picture serves light and dark pages and
print. matplotlib is imported only when a plot is drawn.
"""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 9))
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")

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
    "svg.fonttype": "none", "svg.hashsalt": "repcon", "text.parse_math": False, "font.size": 8.5,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "legend.frameon": False, "legend.fontsize": 8,
    "figure.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.5,
}  # fmt: skip


def styled() -> Any:
    """A context in which figures are made and saved in the house style."""
    import matplotlib

    return matplotlib.rc_context(rc=cast(Any, _RC))


def svg(figure: "Figure", name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page; ids start with `name`, text is text, colours are variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font-family: |font: [^;\"]*?px )'[^;\"]*", r"\1system-ui, sans-serif", text)
    text = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    # Text that matplotlib did not write cannot end up inside the tag: the description is escaped with its quotes.
    opening = (
        f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{escape(description)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    body = text[text.index(">") + 1 :].strip()
    return opening + re.sub(r"\n\s*", "\n", body)


def standalone(element: str) -> str:
    """The same picture as a file of its own, which follows its viewer's light or dark preference."""
    rules = (
        f"<style>svg{{{variables(LIGHT)}}} .plot *{{stroke-linejoin:round}}"
        f"@media (prefers-color-scheme: dark){{svg{{{variables(DARK)}}}}}</style>"
    )
    start = element.index(">") + 1
    return element[:start] + rules + element[start:] + "\n"


def variables(theme: dict[str, str]) -> str:
    """The theme as CSS custom properties."""
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())
