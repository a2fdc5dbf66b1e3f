"""A report as one HTML page: paragraphs, tables and plots, readable in light and dark, with no script and no
external resource.

Knows words and numbers; nothing of models or training. Plots are drawn by matplotlib as SVG and set into the page,
where their colours become the page's own.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from steelyard.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = str | int | float | None
Draw = Callable[["Axes"], None]
SERIES = 6
LABEL = 40  # most characters of a tick or legend label
MATRIX_LABEL = 28
NARROW = 2.0  # inches; figures up to this width stand side by side
CELL_NUMBERS = 20  # a larger matrix shows its counts only under the pointer

# matplotlib draws with these stand-ins; in the page each is a variable of the style sheet.
INK, FAINT, PAPER, ON_SERIES = "#000001", "#000002", "#000003", "#000004"
COLOURS = [f"#00001{place}" for place in range(SERIES)]
_VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "paper", ON_SERIES: "on-series"} | {
    colour: f"series-{place}" for place, colour in enumerate(COLOURS)
}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "steelyard",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
}
# matplotlib's settings and warnings belong to the whole process.
_DRAWING = Lock()

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #8b929a; --paper: #ffffff; --band: #f4f6f8; --rule: #dfe3e8;
  --on-series: #ffffff; --series-0: #2563b0; --series-1: #d9622b; --series-2: #2b8a57; --series-3: #8e4fc0;
  --series-4: #b3872a; --series-5: #c23b6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #7d858e; --paper: #15181b; --band: #1e2226;
  --rule: #343a41; --on-series: #ffffff; --series-0: #4f8fe0; --series-1: #f0854f; --series-2: #4fb583;
  --series-3: #b183e0; --series-4: #d6ac52; --series-5: #ea6d9a; } }
body { max-width: 54rem; margin: 3rem auto; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .75rem 0; }
h1, h2, p, td, th, figcaption { overflow-wrap: anywhere; }
figure { margin: 2rem 0; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; border-bottom: 2px solid var(--rule); white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; }
svg { display: block; max-width: 100%; height: auto; }
figure.narrow { display: inline-block; vertical-align: top; margin: 1rem 3rem 1rem 0; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.heat { white-space: pre-wrap; line-height: 1.9; overflow-wrap: anywhere; }
.heat span { border-radius: 3px; padding: .12em 0; }
.heat .above { background: color-mix(in srgb, var(--series-0) calc(var(--part) * .6), transparent); }
.heat .below { background: color-mix(in srgb, var(--series-1) calc(var(--part) * .6), transparent); }
.heat .none { color: var(--faint); }
@media print { body { margin: 0; max-width: none; } figure { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Report:
    """A page that grows from top to bottom.

    Args:
        title: the page's heading.
    """

    def __init__(self, title: str) -> None:
        self.title = _clean(title)
        self._parts: list[str] = []
        self._plots = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{_escape(text)}</h2>")

    def text(self, paragraph: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{_escape(paragraph)}</p>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A table. Columns of numbers stand to the right; floats show four significant digits, None a dash."""
        assert all(len(row) == len(headers) for row in rows), "a row is not as long as the headers"
        numeric = [
            any(_is_number(row[place]) for row in rows)
            and all(row[place] is None or _is_number(row[place]) for row in rows)
            for place in range(len(headers))
        ]
        marks = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{mark}>{_escape(header)}</th>" for mark, header in zip(marks, headers, strict=True))
        body = "\n".join(
            "<tr>" + "".join(f"<td{mark}>{_cell(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
            for row in rows
        )
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        self._figure(caption, table)

    def lines(
        self,
        title: str,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        x_label: str,
        y_label: str,
        *,
        log_y: bool = False,
        log_x: bool = False,
    ) -> None:
        """Curves over one pair of axes, by name: `(xs, ys)`. Values that are not finite (or with `log_y` not
        positive) are gaps.
        """

        def draw(axes: Axes) -> None:
            for place, (name, (xs, ys)) in enumerate(series.items()):
                values = [y if _drawable(y) and (y > 0 or not log_y) else math.nan for y in ys]
                axes.plot(
                    [x if _drawable(x) else math.nan for x in xs],
                    values,
                    label=_label(name),
                    color=COLOURS[place % SERIES],
                    linestyle=("-", "--", ":", "-.")[place // SERIES % 4],
                    linewidth=1.8,
                    marker="o" if len(values) <= 30 else None,
                    markersize=4,
                )
            if log_y and any(y > 0 and _drawable(y) for _, ys in series.values() for y in ys):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: "")
            if log_x and all(x > 0 for xs, _ in series.values() for x in xs):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.grid(visible=True)
            _axis_labels(axes, x_label, y_label)
            if len(series) > 1:
                axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

        self._plot(title, (8.0, 3.6), draw)

    def bars(self, title: str, values: Mapping[str, float], x_label: str = "") -> None:
        """Horizontal bars with their values, in the given order; a value that is not finite has no bar."""

        def draw(axes: Axes) -> None:
            lengths = [value if _drawable(value) else 0.0 for value in values.values()]
            axes.barh(range(len(values)), lengths, color=COLOURS[0], height=0.65)
            for place, value in enumerate(values.values()):
                # To the right of the bar and of zero: to the left stand the names.
                end = (max(lengths[place], 0.0), place)
                axes.annotate(_cell(value), end, (4, 0), textcoords="offset points", va="center")
            axes.set_yticks(range(len(values)), [_label(name) for name in values])
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.margins(x=0.12, y=0.5 / max(1, len(values)))
            axes.grid(visible=True, axis="x")
            _axis_labels(axes, x_label, "")

        self._plot(title, (8.0, 0.9 + 0.32 * len(values)), draw)

    def matrix(self, title: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
        """A confusion matrix: `counts[true][predicted]`, shaded by the share of the true label's row."""
        size = len(labels)
        assert [len(row) for row in counts] == [size] * size, "the matrix is not as large as its labels"
        names = [_clean(label) for label in labels]
        titles: dict[str, str] = {}

        def draw(axes: Axes) -> None:
            from matplotlib.patches import Rectangle

            small = size > CELL_NUMBERS
            for true, row in enumerate(counts):
                for predicted, count in enumerate(row):
                    if not count:
                        continue
                    share = count / sum(row)
                    cell = Rectangle(
                        (predicted - 0.5, true - 0.5),
                        1,
                        1,
                        facecolor=COLOURS[0],
                        alpha=0.12 + 0.88 * share,
                        linewidth=0,
                    )
                    cell.set_gid(f"cell-{true}-{predicted}")
                    titles[f"cell-{true}-{predicted}"] = (
                        f"true {names[true]}, predicted {names[predicted]}: {count:,} ({share:.0%})"
                    )
                    axes.add_patch(cell)
                    if not small:
                        colour = ON_SERIES if share > 0.45 else INK
                        axes.text(predicted, true, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
            axes.set_xlim(-0.5, size - 0.5)
            axes.set_ylim(size - 0.5, -0.5)
            shown = [_label(name, MATRIX_LABEL) for name in names]
            font = 6 if small else 9
            axes.set_xticks(range(size), shown, rotation=90, fontsize=font)
            axes.set_yticks(range(size), shown, fontsize=font)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(True)
            _axis_labels(axes, "predicted", "true")

        side = size * (0.1 if size > CELL_NUMBERS else 0.38)
        self._plot(title, (side, side), draw, titles)

    def heat(self, title: str, parts: Sequence[tuple[str, float | None]]) -> None:
        """A text in parts, each with a figure or none: what is above zero in one colour, what is below in another, the
        stronger the farther from zero; the figure is shown under the pointer.
        """
        widest = max((abs(figure) for _, figure in parts if figure is not None), default=0.0) or 1.0
        spans = []
        for text, figure in parts:
            shown = html.escape(_printable(text))
            if figure is None or not math.isfinite(figure):
                spans.append(f'<span class="none">{shown}</span>')
                continue
            part = abs(figure) / widest
            kind = "above" if figure >= 0 else "below"
            spans.append(f'<span class="{kind}" style="--part: {100 * part:.0f}%" title="{figure:+.4g}">{shown}</span>')
        self._figure(title, f'<div class="heat">{"".join(spans)}</div>')

    def grid(self, title: str, figures: Sequence[Sequence[float]]) -> None:
        """Squares of figures in rows, coloured as in `heat`."""
        widest = max((abs(figure) for row in figures for figure in row), default=0.0) or 1.0
        self._squares(
            title,
            [
                [
                    (f"var(--series-{0 if one >= 0 else 1})", abs(one) / widest, f"<title>{one:+.4g}</title>")
                    for one in row
                ]
                for row in figures
            ],
        )

    def picture(self, title: str, colours: Sequence[Sequence[str]]) -> None:
        """A small image of colours in rows, each #rrggbb."""
        self._squares(title, [[(html.escape(one), 1.0, "") for one in row] for row in colours])

    def _squares(self, title: str, rows: Sequence[Sequence[tuple[str, float, str]]]) -> None:
        drawn = [
            f'<rect x="{x}" y="{y}" width="1.02" height="1.02" fill="{colour}" fill-opacity="{part:.3f}">{mark}</rect>'
            for y, row in enumerate(rows)
            for x, (colour, part, mark) in enumerate(row)
        ]
        box = f'viewBox="0 0 {len(rows)} {len(rows)}" role="img" aria-label="{html.escape(_clean(title))}"'
        style = 'style="width: 280px" shape-rendering="crispEdges"'
        self._figure(title, f"<svg {box} {style}>{''.join(drawn)}</svg>", narrow=True)

    def html(self) -> str:
        """The page."""
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{_escape(self.title)}</h1>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page to `path`, whole or not at all.

        Raises:
            OSError: the folder cannot be written to.
        """
        write_file(path, self.html())

    def _figure(self, caption: str, content: str, *, narrow: bool = False) -> None:
        heading = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
        mark = ' class="narrow"' if narrow else ""
        self._parts.append(f"<figure{mark}>{heading}{content}</figure>")

    def _plot(
        self, title: str, inches: tuple[float, float], draw: Draw, titles: Mapping[str, str] | None = None
    ) -> None:
        self._plots += 1
        drawn = _drawn(inches, draw, outside=titles is not None)
        svg = _svg(drawn, f"plot-{self._plots}-", _clean(title), titles or {})
        self._figure(title, svg, narrow=inches[0] <= NARROW)


def _drawn(inches: tuple[float, float], draw: Draw, *, outside: bool) -> str:
    """The SVG that matplotlib writes for one pair of axes; `inches` is the whole, or with `outside` without labels."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _DRAWING, matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a script that matplotlib's own font lacks: the browser has one
        figure = Figure(inches, layout=None if outside else "constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_axes((0, 0, 1, 1)) if outside else figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight" if outside else None)
    return file.getvalue()


def _svg(drawn: str, prefix: str, title: str, titles: Mapping[str, str]) -> str:
    """An SVG of matplotlib's for use in a page: ids begin with `prefix`, colours are variables, `titles` are by id."""
    root = ElementTree.fromstring(drawn)  # noqa: S314 (drawn a moment ago, by us)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if (name := attributes.get("id", "")) in titles:
            note = ElementTree.Element("title")
            note.text = titles[name]
            element.insert(0, note)
        if name:
            attributes["id"] = prefix + name
        if "href" in attributes:
            attributes["href"] = f"#{prefix}{attributes['href'][1:]}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{prefix}")
        if "style" in attributes:
            style = re.sub(r"font-family: [^;]*;? ?", "", attributes["style"])
            attributes["style"] = re.sub(
                "#[0-9a-f]{6}",
                lambda match: f"var(--{_VARIABLES[match[0]]})" if match[0] in _VARIABLES else match[0],
                style,
            )
        element.attrib = attributes
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": title,
        "style": f"width: {width * 4 / 3:.0f}px",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _drawable(value: float) -> bool:
    """Finite, and not so large that the arithmetic of an axis overflows."""
    return math.isfinite(value) and abs(value) <= 1e100


def _axis_labels(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(_label(x_label))
    axes.set_ylabel(_label(y_label))


def _clean(text: str) -> str:
    """On one line, without what neither HTML nor XML may hold."""
    return " ".join(_printable(text).split())


def _printable(text: str) -> str:
    """Without what neither HTML nor XML may hold."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)


def _label(text: str, longest: int = LABEL) -> str:
    text = _clean(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _escape(text: str) -> str:
    return html.escape(_clean(text))


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1e4 <= abs(cell) < 1e15 else f"{cell:,.4g}"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return _escape(str(cell))
