"""`steelyard data` as a call: what it removes, hides and shows, and that checkpoints say where rows are from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError
from steelyard.stages import data as stage
from steelyard.stages.tasks.prepared import file_digests, origin_of
from steelyard.train.config import DataConfig, TrainConfig

LONG = "the quick brown fox jumps over the lazy dog and runs away from all the other dogs of the village"


def write_rows(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text, "label": "ab"[number % 2]}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    texts = [
        LONG,
        "mail me at jo@example.com",
        LONG,
        LONG.replace("village", "town"),
        "in the test set, word for word",
        "x",
    ]
    return write_rows(tmp_path / "rows.jsonl", texts)


def test_rows_are_made_ready(rows: Path, tmp_path: Path) -> None:
    against = write_rows(tmp_path / "test.jsonl", ["in the test set, word for word!", "another"])
    wishes = stage.Wishes(near=0.8, against=against, redact=True)
    ready = stage.make_ready(rows, FormatConfig(), wishes)
    assert ready.counts == {
        "rows": 6,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "leaks": 1,
        "redactions": 1,
        "alike_when_redacted": 0,
    }
    assert [stage.text_of(row) for row in ready.rows] == [LONG, "mail me at [EMAIL]", "x"]
    assert ready.personal == {"email": 1}
    assert ready.labels == {"a": 1, "b": 2}
    page = stage.profile(rows, ready, [30, 5, 1]).html()
    assert "Languages" in page
    assert "Tokens of a row" in page


def test_where_rows_are_from_follows_them(rows: Path, tmp_path: Path) -> None:
    ready = stage.make_ready(rows, FormatConfig(), stage.Wishes())
    out = tmp_path / "out"
    assert stage.write(ready, out, 2, 0, [rows]) == {"train_rows": 3, "holdout_rows": 2}
    config = TrainConfig(
        output="x", data=DataConfig(train=str(out / "train.jsonl"), validation=str(out / "holdout.jsonl"))
    )
    digests = file_digests(config)
    assert set(digests) == {
        "train.jsonl",
        "holdout.jsonl",
        "train.jsonl from rows.jsonl",
        "holdout.jsonl from rows.jsonl",
    }
    (out / "train.jsonl").write_text("changed\n")
    assert origin_of(out / "train.jsonl") == {}, "it is no longer what was made"
    (out / "data.json").write_text("{")
    assert origin_of(out / "holdout.jsonl") == {}


def test_lengths_between_powers_of_two() -> None:
    assert stage.histogram([0, 1, 2, 3, 9]) == {"0": 1, "1 to 1": 1, "2 to 3": 2, "4 to 7": 0, "8 to 15": 1}
    assert stage.histogram([]) == {"0": 0}


def test_a_wish_that_cannot_be(rows: Path) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        stage.make_ready(rows, FormatConfig(), stage.Wishes(near=1.5))


def test_what_is_alike_when_redacted_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "text,label\n" + "".join(f"call me at u{number}@mail.com,a\n" for number in range(10)) + "other,b\n"
    )
    ready = stage.make_ready(path, FormatConfig(), stage.Wishes(redact=True))
    assert [(row.text, row.label) for row in ready.rows] == [("call me at [EMAIL]", "a"), ("other", "b")]
    assert ready.counts["alike_when_redacted"] == 9
    assert ready.rows[0].prompt_key == ("call me at [EMAIL]",)


def test_the_page_needs_no_library_but_for_languages(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    page = stage.profile(rows, stage.make_ready(rows, FormatConfig(), stage.Wishes()), None).html()
    assert "Languages are not shown" in page
    assert "Characters of a row" in page
