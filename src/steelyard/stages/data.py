"""Rows made ready: duplicates and leaks removed, personal data hidden, and a page that shows what is left.

What is written says where it is from (`data.json` beside it), and training takes that into its checkpoints' lineage.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from steelyard.atomic import file_aside, write_file
from steelyard.checkpoint import manifest
from steelyard.data import chat, near_duplicates, personal, quality
from steelyard.data.chat import FormatConfig
from steelyard.data.rows import Conversation, Message
from steelyard.data.split import remove_duplicates, split
from steelyard.errors import ConfigError
from steelyard.report import Report
from steelyard.stages.tasks.prepared import ORIGIN

EXAMPLES = 10
"""Odd rows of a kind that the page names."""
Telling = Callable[[int, int], None]


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to rows."""

    near: float | None = None
    """How alike texts are that count as one, 0 to 1; None: only exact duplicates are removed."""
    against: Path | None = None
    """Rows that must not be among these: a test set."""
    redact: bool = False
    """Hide personal data."""
    region: str | None = None
    """Whose phone numbers need no country's code."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that are left, and what became of the others."""

    rows: list[Conversation]
    counts: dict[str, int]
    labels: dict[str, int]
    personal: dict[str, int]
    """How many of each kind of personal data; empty: not looked for."""


def make_ready(file: Path, format_: FormatConfig, wishes: Wishes, report: Telling = lambda done, of: None) -> Ready:
    """Read a file's rows and do what is wished.

    Raises:
        DataError: a row; file, line and field are named.
        ConfigError: a wish that cannot be, or a library that is not installed.
    """
    if wishes.near is not None and not 0 < wishes.near <= 1:
        raise ConfigError(f"how alike near-duplicates are must be above 0 and at most 1, not {wishes.near}")
    rows = chat.read(file, format_)
    counts = {"rows": len(rows)}
    rows = remove_duplicates(rows)
    counts["exact_duplicates"] = counts["rows"] - len(rows)
    if wishes.near is not None:
        firsts = near_duplicates.twins(list(map(text_of, rows)), wishes.near, report)
        kept = [row for number, row in enumerate(rows) if firsts[number] == number]
        counts["near_duplicates"], rows = len(rows) - len(kept), kept
    if wishes.against is not None:
        held = [text_of(row) for row in chat.read(wishes.against, format_)]
        leaked = near_duplicates.leaks(held, list(map(text_of, rows)), wishes.near or 1.0, report)
        rows = [row for number, row in enumerate(rows) if number not in leaked]
        counts["leaks"] = len(leaked)
    found: Counter[str] = Counter()
    if wishes.redact:
        hidden = [_redacted(row, wishes.region, found) for row in rows]
        rows = remove_duplicates(hidden)  # what was hidden may have been all that told them apart
        counts["redactions"] = found.total()
        counts["alike_when_redacted"] = len(hidden) - len(rows)
    labels = Counter(row.label for row in rows if row.label is not None)
    return Ready(rows=rows, counts=counts, labels=dict(sorted(labels.items())), personal=dict(found))


def text_of(row: Conversation) -> str:
    """All that a row says."""
    return row.text if row.text is not None else "\n".join(message.content for message in row.messages)


def _redacted(row: Conversation, region: str | None, counts: Counter[str]) -> Conversation:
    def hidden(text: str) -> str:
        found = personal.find(text, region=region)
        counts.update(each.kind for each in found)
        return personal.redact(text, found)

    if row.text is not None:  # a labelled row is written as text and label; that text is what tells rows apart
        text = hidden(row.text)
        return msgspec.structs.replace(row, text=text, messages=(Message("user", text), row.messages[-1]))
    messages = tuple(Message(turn.role, hidden(turn.content), turn.trained) for turn in row.messages)
    return msgspec.structs.replace(row, messages=messages)


def write(ready: Ready, out: Path, holdout: int, seed: int, sources: Sequence[Path]) -> dict[str, int]:
    """Write train.jsonl and holdout.jsonl, no text in both, and where they are from; returns how many rows each has.

    Raises:
        ConfigError: more to hold out than there is.
    """
    kept, held = split(ready.rows, holdout, seed)
    # Both or none: with one of an earlier split, a text could be in both.
    with file_aside(out / "train.jsonl") as train, file_aside(out / "holdout.jsonl") as rest:
        train.writelines(map(_line, kept))
        rest.writelines(map(_line, held))
    origin = {
        "sources": {source.name: manifest.sha256_file(source) for source in sources},
        "files": {name: manifest.sha256_file(out / name) for name in ("train.jsonl", "holdout.jsonl")},
        "counts": ready.counts,
    }
    write_file(out / ORIGIN, json.dumps(origin, indent=2, ensure_ascii=False) + "\n")
    return {"train_rows": len(kept), "holdout_rows": len(held)}


def _line(row: Conversation) -> bytes:
    if row.text is not None:  # labelled: as it was, so that it stays labelled
        return (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) + "\n").encode()
    if row.messages[0].role == "text":
        return (json.dumps({"text": row.messages[0].content}, ensure_ascii=False) + "\n").encode()
    messages = [
        {"role": message.role, "content": message.content} | ({} if message.trained else {"weight": 0})
        for message in row.messages
    ]
    return (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode()


def profile(file: Path, ready: Ready, lengths: Sequence[int] | None) -> Report:
    """A page of what the rows are like: lengths, labels, languages, what is odd.

    Args:
        file: where they are from.
        ready: the rows.
        lengths: tokens of each, if a model counted them.
    """
    texts = list(map(text_of, ready.rows))
    found = [quality.of(text) for text in texts]
    report = Report(f"Data: {file.name}")
    report.table(["rows", "number"], [[key.replace("_", " "), str(value)] for key, value in ready.counts.items()], "")
    if ready.labels:
        report.bars("Rows of each label", ready.labels, "rows")
    report.bars("Characters of a row", histogram([each.characters for each in found]), "rows")
    if lengths is not None:
        report.bars("Tokens of a row", histogram(lengths), "rows")
    try:
        report.bars("Languages", dict(quality.languages(texts).most_common(12)), "rows")
    except ConfigError as error:  # the rest of the page needs no library
        report.text(f"Languages are not shown: {error}.")
    if ready.personal:
        report.bars("Personal data that was hidden", ready.personal, "places")
    odd: dict[str, list[Conversation]] = {}
    for row, each in zip(ready.rows, found, strict=True):
        for problem in each.problems:
            odd.setdefault(problem, []).append(row)
    rows = [
        [problem, str(len(some)), ", ".join(str(row.line) for row in some[:EXAMPLES])] for problem, some in odd.items()
    ]
    report.table(["what is odd", "rows", "lines, the first of them"], rows or [["nothing", "0", ""]], "By simple rules")
    return report


def histogram(values: Sequence[int]) -> dict[str, float]:
    """How many values lie between powers of two."""
    counts = Counter(max(0, int(value)).bit_length() for value in values)
    edges = range(min(counts, default=0), max(counts, default=0) + 1)
    named = {bits: "0" if not bits else f"{1 << bits - 1} to {(1 << bits) - 1}" for bits in edges}
    return {named[bits]: float(counts[bits]) for bits in edges}
