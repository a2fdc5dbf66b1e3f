"""Files that nobody wrote with care, or that somebody wrote with malice: one line, the right code, the right place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command import Command

GOOD = '{"text": "a", "label": "ham"}\n{"text": "b", "label": "spam"}\n'
LONG = "x" * (1 << 20)

READ = {
    "quotes.csv": 'text,label\n"a\nb ""c"", d",ham\nx,spam\n',
    "quote in the middle.csv": 'text,label\nab"c,ham\nx,spam\n',
    "quotes.tsv": 'text\tlabel\n"a\tham\nx"\tspam\n',
    "bom.csv": b"\xef\xbb\xbftext,label\r\na,ham\r\nb,spam\r\n",
    "nul.csv": "text,label\na\0b,ham\nb,spam\n",
    "nul.jsonl": '{"text": "a\\u0000", "label": "ham"}\n' + GOOD,
    "long line.jsonl": json.dumps({"text": LONG, "label": "ham"}) + "\n" + GOOD,
    "long line.csv": f"text,label\n{LONG},ham\nb,spam\n",
    "nested.jsonl": '{"text": "a", "label": "ham", "more": ' + "[" * 500 + "]" * 500 + "}\n" + GOOD,
    "markup.jsonl": '{"text": "a", "label": "[/bold]"}\n{"text": "b", "label": ":smile:[red]\\u001b[2J"}\n',
    "no line end.tsv": "text\tlabel\na\tham\nb\tspam",
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("json_", [True, False])
def test_what_is_odd_but_right_is_read(command: Command, name: str, json_: bool) -> None:
    content = READ[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = command("data", name, *(["--json"] if json_ else []))
    assert (done.code, done.err) == (0, "")
    if json_:
        assert done.object["format"] == "labelled"
        assert len(done.object["labels"]) == 2
    elif name == "markup.jsonl":
        assert "[/bold]" in done.out
        assert ":smile:[red]" in done.out
        assert "\x1b" not in done.out


REFUSED = {
    # by name, what the file holds, the line complained of, and the complaint
    "open quote.csv": ("text,label\na,ham\n" + '"b,spam\n' + "c,spam\n" * 9, 3, "not CSV: unexpected end of data"),
    "old mac.csv": ("text,label\ra,ham\rb,spam\r", 1, "not CSV: new-line character"),
    "columns.csv": ("text,label\na,ham\nb,spam,c\n", 3, "3 fields where the header has 2 (text, label)"),
    "twice.csv": ("text,text,label\na,b,ham\n", 1, "field 'text': two columns have this name"),
    "semicolons.csv": ("text;label\na;ham\n", 2, "the row has: text;label"),
    "no header.tsv": ("ham\thello\nspam\twin\n", 2, "--columns a,b"),
    "one label.csv": ("text,label\na,ham\nb,ham\n", None, "field 'label': one label only ('ham')"),
    "empty.csv": ("", None, "the file has no rows"),
    "empty.jsonl": ("", None, "the file is empty"),
    "empty.txt": ("\n \n", None, "the file has no rows"),
    "header only.csv": ("text,label\n", None, "the file has no rows"),
    "utf-16.csv": ("text,label\na,ham\n".encode("utf-16"), 1, "byte 0 is not UTF-8; save the file as UTF-8"),
    "latin-1.tsv": (b"text\tlabel\na\tham\n\xe9t\xe9\tspam\n", 3, "byte 0 is not UTF-8"),
    "huge line.txt": ("y" * (9 << 20), 1, "the line is over 8 MB"),
    "array.jsonl": ('[{"text": "a"}]\n', 1, "a JSON object is needed, not an array"),
    "pretty.jsonl": ('[\n  {"text": "a"}\n]\n', 1, "each line must be one whole JSON object"),
    "raw nul.jsonl": (b'{"text": "a\x00", "label": "ham"}\n', 1, "not JSON: Invalid control character at column"),
    "number.jsonl": (GOOD + '{"text": 5, "label": "ham"}\n', 3, "field 'text': must be a string, not a number"),
    "number as label.jsonl": (GOOD + '{"text": "a", "label": 1}\n', 3, "field 'label': must be a string, not a number"),
    "null.jsonl": (GOOD + '{"text": null, "label": "ham"}\n', 3, "field 'text': is null"),
    "nan.jsonl": (GOOD + '{"text": "a", "label": "ham", "x": NaN}\n', 3, "NaN is no finite number"),
    "infinite.jsonl": (GOOD + '{"text": "a", "label": "ham", "x": -1e999}\n', 3, "-1e999 is no finite number"),
    "digits.jsonl": (GOOD + '{"x": ' + "9" * 5000 + "}\n", 3, "too many digits"),
    "twice.jsonl": (GOOD + '{"text": "a", "text": "b", "label": "ham"}\n', 3, "field 'text': is there twice"),
    "twice inside.jsonl": (GOOD + '{"x": [{"a": 1, "a": 2}]}\n', 3, "field 'a': is there twice"),
    "deep.jsonl": (GOOD + "[" * 100_000 + "\n", 3, "nested too deeply"),
    "surrogate.jsonl": (GOOD + '{"text": "\\ud800", "label": "ham"}\n', 3, "field 'text': has a lone surrogate"),
    "surrogate key.jsonl": (GOOD + '{"\\udfff": 1}\n', 3, "has a lone surrogate"),
    "escape codes.jsonl": (
        '{"messages": [{"role": "\\u001b[2J\\u0007\\n", "content": "a"}]}\n',
        1,
        "not '\\x1b[2J\\x07 '",
    ),
    "long role.jsonl": (json.dumps({"messages": [{"role": LONG, "content": "a"}]}) + "\n", 1, "must be one of system"),
    "picture.png": (b"\x89PNG\r\n", None, "cannot tell the format by the ending"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_with_its_line(command: Command, name: str) -> None:
    content, line, reason = REFUSED[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = command("data", name, "--json", "--holdout", 1, "--out", "parts")
    complaint = done.complaint(3)
    assert complaint.startswith(f"{name}: " if line is None else f"{name}:{line}: ")
    assert reason in complaint
    assert len(complaint) <= 2005
    assert done.object["error"] == {"message": complaint, "type": "DataError", "code": "invalid_data"}
    assert not Path("parts").exists()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("none.csv", "no such file"), ("folder.csv", "this is a folder"), ("pipe.csv", "this is no regular file")],
)
@pytest.mark.parametrize("verb", [["data"], ["evaluate", "--model", "x"], ["predict", "--model", "x"]])
def test_what_is_no_file(command: Command, path: str, complaint: str, verb: list[str]) -> None:
    Path("folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    assert command(verb[0], path, *verb[1:]).complaint(3).startswith(f"{path}: {complaint}")


@pytest.mark.parametrize("verb", [["data"], ["evaluate", "--model", "x"], ["predict", "--model", "x"]])
def test_paths_that_cannot_be(command: Command, verb: list[str]) -> None:
    assert "File name too long" in command(verb[0], "a" * 300 + ".csv", *verb[1:]).complaint(2)
    assert "this is a folder" in command(verb[0], ".", *verb[1:]).complaint(3)
    assert "this is a folder" in command(verb[0], "", *verb[1:]).complaint(3)


def test_a_file_that_may_not_be_read(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.csv").write_text("text,label\na,ham\nb,spam\n")

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert command("data", "rows.csv").complaint(3) == (
        "rows.csv: cannot be read: Permission denied; check its permissions"
    )
