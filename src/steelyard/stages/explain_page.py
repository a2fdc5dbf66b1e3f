"""An explanation as a page: a heat map, the largest shares, how far they can be believed, what else was found."""

from __future__ import annotations

from pathlib import Path

import torch

from steelyard.report import Cell, Report
from steelyard.stages.explain import Explained
from steelyard.stages.explain_inputs import Drawing

MOST_PIXELS = 64
"""Of a side of an image that is drawn."""
UNACCOUNTED = "More than half of the value is not accounted for: trust the order more than the figures."


def page(checkpoint: Path, found: Explained, drawing: Drawing) -> Report:
    """See the module."""
    report = Report(f"Why '{found.target}'?")
    report.text(
        f"{checkpoint.name} finds it likely by {found.probability:.1%}. Shares by {found.method}: what is blue speaks"
        " for it, what is orange against it; the figure is under the pointer."
    )
    shares = [unit.share for unit in found.units]
    if drawing.parts:
        report.heat("the text", [(text, None if unit is None else shares[unit]) for text, unit in drawing.parts])
    if drawing.image is not None:
        own = [unit.share for unit in found.units if unit.kind == "image"]
        across = drawing.image.across
        report.picture("the image", _colours(drawing.image.image))
        report.grid("its shares", [own[row * across : (row + 1) * across] for row in range(across)])
    if "audio" in found.kinds:
        moments = [unit.share for unit in found.units if unit.kind == "audio"]
        series = {"share": ([number * drawing.moment for number in range(len(moments))], moments)}
        report.lines("the sound", series, "seconds", "share")
    if len(found.kinds) > 1:
        report.bars("by kind", found.kinds, "sum of shares")
    largest = sorted(found.units, key=lambda unit: -abs(unit.share))[:12]
    report.bars(
        "largest shares", {f"{unit.unit.strip()} ({place})": unit.share for place, unit in enumerate(largest, 1)}
    )
    report.table(
        ["value", "of nothing", "accounted for by units", "by the rest", "not accounted for"],
        [[found.value, found.base, sum(shares), found.rest, found.residual]],
    )
    if found.mostly_unaccounted:
        report.text(UNACCOUNTED)
    if found.faithfulness is not None and found.chance is not None:
        rows: list[list[Cell]] = [
            [name, *(getattr(figures, name) for figures in (found.faithfulness, found.chance)), better]
            for name, better in (
                ("deletion", "lower"),
                ("insertion", "higher"),
                ("comprehensiveness", "higher"),
                ("sufficiency", "lower"),
            )
        ]
        report.heading("How far it can be believed")
        report.table(["", "these shares", "random orders", "better is"], rows)
    if found.lens is not None:
        report.heading("What each layer would say next")
        told: list[list[Cell]] = [
            [number, ", ".join(f"{token.strip() or token!r} {share:.0%}" for token, share in layer)]
            for number, layer in enumerate(found.lens)
        ]
        report.table(["layer", "likeliest"], told)
    if found.nearest is not None:
        report.heading("Rows it learnt from that are most like this")
        lines: list[list[Cell]] = [[near.line, near.label, near.cosine, near.text] for near in found.nearest]
        report.table(["line", "label", "cosine", "text"], lines)
    return report


def _colours(image: torch.Tensor) -> list[list[str]]:
    """An image `[C, S, S]` uint8 as colours, at most 64 of a side."""
    step = max(1, -(-image.shape[1] // MOST_PIXELS))
    small = image[:, ::step, ::step]
    wide = small.expand(3, -1, -1) if small.shape[0] == 1 else small
    rows: list[list[list[int]]] = wide.permute(1, 2, 0).tolist()
    return [["#" + "".join(f"{part:02x}" for part in pixel) for pixel in row] for row in rows]
