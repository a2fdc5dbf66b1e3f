"""Rows that are read again instead of being held: the same ones, the same complaints, the same tokens from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data import tokenize
from steelyard.data.rows import Conversation, Message, TokenRow
from steelyard.errors import ConfigError, DataError
from steelyard.runs import Run
from steelyard.stages.tasks import prepared
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.config import DataConfig, TrainConfig

TEXTS = st.sampled_from(["a b", "a b ", "c", "d e f", "g", "h i", "j"])
ANSWERS = st.sampled_from(["yes", "no"])
ROWS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=12)


def write(path: Path, rows: list[tuple[str, str]], labelled: bool) -> Path:
    def row(text: str, answer: str) -> dict[str, Any]:
        if labelled:
            return {"text": text, "label": answer}
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}

    path.write_text("".join(json.dumps(row(*pair)) + "\n" for pair in rows))
    return path


def outcome(read: Callable[[TrainConfig], Any], config: TrainConfig) -> Any:
    try:
        read_config, learnt, held = read(config)
    except (DataError, ConfigError) as error:
        return str(error)
    lines = [sorted(row.line for row in rows) for rows in (learnt, held)]
    return read_config, lines, len(learnt)


@given(
    rows=ROWS,
    other=st.none() | ROWS,
    holdout=st.integers(0, 4),
    seed=st.integers(0, 3),
    flags=st.tuples(*[st.booleans()] * 2),
)
def test_the_same_rows_as_when_they_are_held(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    other: list[tuple[str, str]] | None,
    holdout: int,
    seed: int,
    flags: tuple[bool, bool],
) -> None:
    labelled, deduplicate = flags
    folder = tmp_path_factory.mktemp("rows")
    train = str(write(folder / "train.jsonl", rows, labelled))
    validation = None if other is None else str(write(folder / "held.jsonl", other, labelled))
    data = DataConfig(train=train, validation=validation, holdout=0 if other else holdout, deduplicate=deduplicate)
    config = TrainConfig(output=str(folder / "run"), data=data, seed=seed)
    assert outcome(prepared.streamed, config) == outcome(prepared.conversations, config)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [(f"text {number}", "yes") for number in range(9)], False)
    config = TrainConfig(output=str(tmp_path / "run"), data=DataConfig(train=str(path), holdout=2))
    _, learnt, _ = prepared.streamed(config)
    assert len(list(learnt)) == 7
    write(path, [("another", "no"), *((f"text {number}", "yes") for number in range(9))], False)
    with pytest.raises(DataError, match="was changed while it was read"):
        list(learnt)


def test_few_documents_are_held_at_a_time(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "CHARACTERS", 100)
    monkeypatch.setattr(tokenize, "TOGETHER", 5)
    read: list[int] = []

    def documents(content: str) -> Iterator[Conversation]:
        for number in range(40):
            read.append(number)
            yield Conversation(messages=(Message("text", content),))

    tokenizer = Tokenizer.load(tiny_model)
    for content, most in (("word " * 10, 2), ("a b c", 5)):
        read.clear()
        rows = tokenize.tokenized(documents(content), tokenizer, None, 16)
        next(rows)
        assert len(read) == most
        assert 1 + sum(1 for _ in rows) == len(tokenize.tokenize(list(documents(content)), tokenizer, None, 16))


def test_what_decides_the_tokens_of_mapped_files(tmp_path: Path) -> None:
    """They are taken again if nothing of it changed, and made again if anything did."""
    path = write(tmp_path / "rows.jsonl", [("a", "yes")], False)
    config = TrainConfig(output=str(tmp_path / "run"), data=DataConfig(train=str(path)))
    run = Run(tmp_path / "run", {})
    made: list[int] = []

    def rows() -> Iterator[TokenRow]:
        made.append(1)
        yield TokenRow(tokens=[len(made), 2], trained=[False, True])

    def first_token(config: TrainConfig, *made_with: str) -> int:
        return prepared.mapped_rows(run, config, rows(), *made_with)[0].tokens[0]

    replace = msgspec.structs.replace
    longer = replace(config, data=replace(config.data, max_length=2048))
    try:
        assert first_token(config, "tokenizer", "template") == 1
        assert first_token(config, "tokenizer", "template") == 1
        assert first_token(config, "tokenizer", "another") == 2
        assert first_token(longer, "tokenizer", "another") == 3
        assert first_token(replace(longer, seed=1), "tokenizer", "another") == 4
        write(path, [("b", "yes")], False)
        assert first_token(replace(longer, seed=1), "tokenizer", "another") == 5
    finally:
        run.close()
