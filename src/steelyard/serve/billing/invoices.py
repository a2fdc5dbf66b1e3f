"""A project's month as an invoice: CSV for machines, a page for people. Sums of the ledger, to the nano-dollar."""

from __future__ import annotations

import csv
import html
import io
from typing import Any

from steelyard.serve.billing.prices import NANO

COLUMNS = ("service", "model", "batch", "requests", "input_tokens", "cached_tokens", "output_tokens", "training_tokens")
STYLE = """
body { font: 15px/1.5 system-ui; max-width: 70em; margin: 3em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100% }
td, th { padding: .35em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
"""


def lines_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A month's rows by service, model and batch."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["line_item"], row["model"], row["batch"])
        line = found.setdefault(key, {"service": key[0], "model": key[1], "batch": key[2], "cost": 0})
        for name in (*COLUMNS[3:], "cost"):
            line[name] = line.get(name, 0) + row[name]
    return [found[key] for key in sorted(found, key=str)]


def as_csv(lines: list[dict[str, Any]], total: int) -> str:
    """The lines as a table, dollars to the nano-dollar."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, "dollars"])
    for line in lines:
        writer.writerow([*(line[name] for name in COLUMNS), _exact(line["cost"])])
    writer.writerow(["total", *[""] * (len(COLUMNS) - 1), _exact(total)])
    return text.getvalue()


def as_html(project: dict[str, Any], month: str, lines: list[dict[str, Any]], total: int) -> str:
    """The lines as a page of their own."""

    def cells(values: list[object], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    rows = "\n".join(cells([*(line[name] for name in COLUMNS), _exact(line["cost"])]) for line in lines)
    head = cells([*(name.replace("_", " ") for name in COLUMNS), "dollars"], "th")
    return f"""<!doctype html>
<meta charset="utf-8"><title>Invoice {html.escape(month)}</title>
<style>{STYLE}</style>
<h1>Invoice {html.escape(month)}</h1>
<p>{html.escape(project["name"])} ({html.escape(project["id"])})</p>
<table>{head}
{rows}
{cells(["total", *[""] * (len(COLUMNS) - 1), _exact(total)])}</table>
"""


def _exact(nano: int) -> str:
    """Dollars to the nano-dollar."""
    sign, nano = ("-", -nano) if nano < 0 else ("", nano)
    return f"{sign}{nano // NANO}.{nano % NANO:09d}"
