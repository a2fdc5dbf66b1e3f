"""Settings and output paths that make no sense: one line, the right code, and nothing that was there is harmed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from command import Command

from steelyard import atomic
from steelyard.checkpoint import manifest

ROWS = "text,label\nhello,ham\nwin now,spam\nhi,ham\n"


def state(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True)
def rows(command: Command) -> None:
    """rows.csv, a file and a folder that somebody needs."""
    Path("rows.csv").write_text(ROWS)
    Path("file").write_text("precious")
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("precious")


@pytest.mark.parametrize(
    ("setting", "code", "complaint"),
    [
        ("zebra=1", 2, "--set: unknown key 'zebra'; known here: format, columns"),
        ("lable=class", 2, "--set: unknown key 'lable'; did you mean 'label'?"),
        ("data.txt=body", 2, "--set: unknown key 'txt'; did you mean 'text'?"),
        ("text", 2, "write it as table.key=value"),
        ("=", 2, "write it as table.key=value"),
        ("", 2, "write it as table.key=value"),
        ("text.a=1", 2, "Expected `str`, got `object` at `text`"),
        ("text=5", 2, "Expected `str`, got `int` at `text`"),
        ("text=2024-01-01", 2, "Expected `str`, got `date` at `text`"),
        ("labels=ham", 2, "Expected `array`, got `str` at `labels`"),
        ('labels=["ham"]', 2, "data.labels names 1: at least two are needed"),
        ('labels=["ham", "ham"]', 2, "data.labels: 'ham' is there twice"),
        ('labels=["ham", " spam"]', 2, "begins or ends with a space"),
        ('labels=["ham", "eggs"]', 3, "rows.csv:3: field 'label': 'spam' is not one of ham, eggs"),
        ("labels=" + "[" * 100_000, 2, "Expected `array`, got `str` at `labels`"),
        ("text=" + "9" * 5000, 3, "is missing; the row has: text, label"),
        ("text=1\nlabel=2", 3, "field '1 label=2': is missing"),
        ("text=body", 3, "field 'body': is missing; the row has: text, label"),
        ("template=Which?", 2, "data.template has no {text}"),
        ("format=chat", 3, "rows.csv:1: not JSON"),
        ("format=alpaca", 2, "data.format 'alpaca' is not known"),
        ('columns=["a", "a"]', 3, "field 'a': two columns have this name"),
        ('columns=["text", "label", "more"]', 3, "rows.csv:1: 2 fields where the header has 3"),
    ],
)
def test_settings(command: Command, setting: str, code: int, complaint: str) -> None:
    assert complaint in command("data", "rows.csv", "--set", setting).complaint(code)


def test_a_setting_that_equals_the_default_still_overrides_the_checkpoints(
    command: Command, tiny_model: Path, tmp_path: Path
) -> None:
    with manifest.writing(tmp_path / "trained", recipe={"train": {"data": {"text": "body"}}}) as folder:
        for path in manifest.model_files(tiny_model):
            (folder / path.name).write_bytes(path.read_bytes())
    evaluate = ("evaluate", "rows.csv", "-m", tmp_path / "trained")
    assert "field 'body': is missing" in command(*evaluate).complaint(3)
    assert command(*evaluate, "--set", "text=text", "--json").object["rows"] == 3


@pytest.mark.parametrize(
    "recipe", [{"train": 5}, {"train": {"data": ["x"]}}, {"train": {"data": {"labels": 5}}}, {"train": None}]
)
def test_a_lineage_that_somebody_made_up(command: Command, tiny_model: Path, tmp_path: Path, recipe: dict) -> None:  # type: ignore[type-arg]
    with manifest.writing(tmp_path / "strange", recipe=recipe) as folder:
        for path in manifest.model_files(tiny_model):
            (folder / path.name).write_bytes(path.read_bytes())
    done = command("evaluate", "rows.csv", "-m", "strange")
    if recipe == {"train": {"data": {"labels": 5}}}:
        assert "holds no row format in recipe.train.data" in done.complaint(6)
    else:
        assert done.code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["data", "rows.csv", "--holdout", "1", "--out", "file"], 2, "cannot use 'file/train.jsonl': File exists"),
        (["data", "rows.csv", "--holdout", "1"], 2, "--holdout needs --out FOLDER"),
        (["data", "rows.csv", "--holdout", "3", "--out", "parts"], 2, "cannot hold out 3 of 3 rows"),
        (["data", "rows.csv", "--holdout", "-1", "--out", "parts"], 2, "Invalid value for '--holdout'"),
        (["data", "rows.csv", "--seed", "x", "--out", "parts"], 2, "Invalid value for '--seed'"),
        (["evaluate", "rows.csv", "-m", "MODEL", "--report", "folder"], 2, "cannot use 'folder': Is a directory"),
        (["evaluate", "rows.csv", "-m", "MODEL", "--report", "file/a.html"], 2, "cannot use 'file/a.html'"),
        (["evaluate", "rows.csv", "-m", "MODEL", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["predict", "rows.csv", "-m", "MODEL", "--labels", "a,b", "-o", "folder"], 2, "Is a directory"),
        (["predict", "rows.csv", "-m", "MODEL", "--labels", "a,b", "-o", "file/x"], 2, "cannot use 'file/x'"),
        (["predict", "rows.csv", "-m", "MODEL", "--labels", "a,b", "-o", "./rows.csv"], 2, "is the file that is read"),
        (["predict", "rows.csv", "-m", "MODEL", "--labels", "ham,"], 2, "data.labels: '' is empty"),
        (["predict", "rows.csv", "-m", "MODEL", "--labels", "ham"], 2, "at least two are needed"),
        (["compress", "quantize", "MODEL", "-o", "file"], 2, "is there and is no checkpoint"),
        (["compress", "quantize", "MODEL", "-o", "folder"], 2, "is there and is no checkpoint"),
        (["compress", "quantize", "MODEL", "-o", "."], 2, "is there and is no checkpoint"),
        (["compress", "quantize", "MODEL", "-o", "file/x"], 2, "file/x': File exists"),
        (["compress", "quantize", "MODEL", "-o", "MODEL"], 2, "which is still needed"),
        (["compress", "quantize", "MODEL", "-o", "MODEL/.."], 2, "which is still needed"),
        (["compress", "quantize", "MODEL"], 2, "Missing option '--output'"),
        (["compress", "distill"], 2, "No such command 'distill'; see `steelyard compress --help`"),
        (["generate", "MODEL", "hi", "--temperature", "nan"], 2, "Invalid value for '--temperature'"),
        (["generate", "MODEL", "hi", "--top-p", "2"], 2, "Invalid value for '--top-p'"),
        (["generate", "MODEL", "hi", "--system", "a", "--raw"], 2, "--system needs a model with a chat template"),
        (["generate", "MODEL", "hi " * 600], 10, "the context holds 512"),
        (["generate", "folder", "hi"], 6, "'folder' is no checkpoint"),
        (["train", "folder"], 2, "no file 'folder': this is a folder"),
        (["train", "rows.csv"], 2, "'rows.csv' is not TOML"),
        (["data", "rows.csv", "--colums", "a,b"], 2, "No such option: --colums"),
    ],
)
def test_outputs_and_options(
    command: Command, tiny_model: Path, tmp_path: Path, arguments: list[str], code: int, complaint: str
) -> None:
    before, model = state(tmp_path), state(tiny_model)
    done = command(*(word.replace("MODEL", str(tiny_model)) for word in arguments), "--json")
    said = done.complaint(code)
    assert complaint in said
    assert done.object["error"]["message"] == said
    assert state(tmp_path) == before
    assert state(tiny_model) == model


def test_the_parts_of_a_split_appear_together_or_not_at_all(command: Command, tmp_path: Path) -> None:
    Path("parts").mkdir()
    Path("parts/train.jsonl").write_text("of an earlier split")
    Path("parts/holdout.jsonl").mkdir()
    before = state(tmp_path)
    command("data", "rows.csv", "--holdout", 1, "--out", "parts").complaint(2)
    assert state(tmp_path) == before


def test_a_full_disk(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = state(tmp_path)
    monkeypatch.setattr(atomic.os, "fsync", full)
    done = command("data", "rows.csv", "--holdout", 1, "--out", "parts", "--json")
    assert done.complaint(1) == "the system refuses: No space left on device"
    assert state(tmp_path) == {**before, str(tmp_path / "parts"): None}


def test_paths_that_look_like_markup(command: Command, tiny_model: Path) -> None:
    output = Path("a[/bold]:smile:[red].jsonl")
    done = command("predict", "rows.csv", "-m", tiny_model, "--labels", "ham,spam", "-o", output)
    assert done.out.strip() == f"3 rows in {output}"
    assert output.is_file()


def test_negative_and_large_seeds_split(command: Command) -> None:
    for seed in (-1, 2**64 - 1, 2**70):
        assert command("data", "rows.csv", "--holdout", 1, "--out", "parts", "--seed", seed, "--json").object["rows"]


def test_a_split_of_the_command_line_keeps_every_row_and_weight(command: Command) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a", "weight": n % 2}]}
        for n in range(6)
    ]
    for chat in chats:
        chat["messages"].append({"role": "assistant", "content": "b"})
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    command("data", "chats.jsonl", "--holdout", 2, "--out", "parts")
    found = [
        json.loads(line)
        for name in ("train", "holdout")
        for line in Path(f"parts/{name}.jsonl").read_text().splitlines()
    ]
    for chat in [*chats, *found]:
        for turn in chat["messages"]:
            turn.setdefault("weight", 1)
    assert sorted(found, key=str) == sorted(chats, key=str)
    assert len(Path("parts/holdout.jsonl").read_text().splitlines()) == 2
