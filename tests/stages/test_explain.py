"""Explaining by the stage and the verb that users call: texts, chats, images, rows of several kinds; and the page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import drawn
import several_kinds
from steelyard.cli import main
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.stages.explain import Explained, explain
from steelyard.stages.explain_inputs import Wanted
from steelyard.stages.explain_page import page
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import LstmNetwork
from steelyard.train.optimizers import OptimizerConfig

FILLER = ("the", "weather", "is", "as", "it", "was", "today", "again", "rather")


def accounts(found: Explained) -> None:
    """What is told adds up."""
    told = found.base + found.rest + found.residual + sum(unit.share for unit in found.units)
    assert told == pytest.approx(found.value, abs=1e-6)
    assert found.faithfulness is not None
    assert found.chance is not None
    assert 0 < found.probability <= 1


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows two words."""
    folder = tmp_path_factory.mktemp("explained")
    draw, rows = random.Random(0), folder / "rows.jsonl"
    with rows.open("w") as file:
        for _ in range(200):
            label, words = draw.choice(["cold", "warm"]), draw.choices(FILLER, k=6)
            words[draw.randrange(6)] = {"cold": "frost", "warm": "sun"}[label]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    config = TrainConfig(
        task="classification",
        network=LstmNetwork(vocabulary=300, embedding=16, hidden=16, dense=16),
        output=str(folder / "run"),
        data=DataConfig(train=str(rows), holdout=20, deduplicate=False),
        epochs=12,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return Path(str(train(config).path))


def test_a_text_and_the_rows_that_taught_it(learnt: Path) -> None:
    found, drawing = explain(learnt, "today it was frost again", FormatConfig(), Wanted(nearest=6))
    accounts(found)
    assert found.target == "cold"
    assert max(found.units, key=lambda unit: unit.share).unit.strip() in "frost"
    assert "".join(part for part, _ in drawing.parts) == "today it was frost again"
    assert found.nearest is not None
    assert [near.label for near in found.nearest[:3]] == ["cold"] * 3
    assert found.nearest[0].cosine > 0
    html = page(learnt, found, drawing).html()
    assert "Why &#x27;cold&#x27;?" in html
    assert 'class="heat"' in html
    assert "random orders" in html
    other, _ = explain(learnt, "today it was frost again", FormatConfig(), Wanted(target="warm", method="occlusion"))
    accounts(other)
    assert min(other.units, key=lambda unit: unit.share).unit.strip() in "frost"


def test_what_a_text_may_not_ask(learnt: Path, tmp_path: Path, tiny_model: Path) -> None:
    for wanted, complaint in (
        (Wanted(target="mild"), "none of cold, warm"),
        (Wanted(lens=2), "models that write"),
        (Wanted(nearest=2, rows=tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        with pytest.raises((ConfigError, DataError), match=complaint):
            explain(learnt, "frost", FormatConfig(), wanted)
    with pytest.raises(ConfigError, match="--rows"):
        explain(tiny_model, "x", FormatConfig(), Wanted(nearest=1, target="y"))


def test_a_row_of_a_file_is_its_text(learnt: Path, tmp_path: Path) -> None:
    """A text that only ends like one is a text."""
    rows = tmp_path / "held.csv"
    rows.write_text("text,label\nsun all day,warm\ntoday it was frost again,cold\n")
    first, _ = explain(learnt, str(rows), FormatConfig(), Wanted(faithfulness=False))
    second, drawing = explain(learnt, str(rows), FormatConfig(), Wanted(row=2, faithfulness=False))
    assert second.target == "cold"
    assert first.units != second.units
    assert "".join(part for part, _ in drawing.parts) == "today it was frost again"
    text, _ = explain(learnt, "frost in held.csv", FormatConfig(), Wanted(faithfulness=False))
    assert len(text.units) > 2
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "frost?"}]
    answer = {"role": "assistant", "content": "Yes."}
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in ([turns[1], answer], [*turns, answer])))
    asked, _ = explain(learnt, str(chats), FormatConfig(), Wanted(faithfulness=False))
    assert "".join(unit.unit for unit in asked.units) == "frost?"
    for given, wanted, complaint in (
        (str(chats), Wanted(row=2), "more is said before the answer"),
        ("frost " * 100 + "held.csv", Wanted(row=1), "--row 1 is of a file of rows"),
        (str(rows), Wanted(row=3), "has 2 rows"),
        (str(tmp_path / "none.jsonl"), Wanted(), "there is no file"),
        ("frost", Wanted(row=2), "--row 2 is of a file of rows"),
        (" ", Wanted(), "the text is empty"),
    ):
        with pytest.raises((ConfigError, DataError), match=complaint):
            explain(learnt, given, FormatConfig(), wanted)


def test_a_chat_and_its_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Its own, or one that is named; only what the user says has shares; rows of chats are compared."""
    rows = tmp_path / "chats.jsonl"
    turns = [("Who weighs?", "The steelyard."), ("Where?", "München."), ("x y z", "so on")]
    with rows.open("w") as file:
        for asked, answered in turns:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")
    found, drawing = explain(tiny_model, "Who weighs?", FormatConfig(), Wanted(lens=2))
    accounts(found)
    assert "".join(unit.unit for unit in found.units).replace(" ", "") == "Whoweighs?"
    assert found.lens is not None
    assert len(found.lens) == 3
    whole = "".join(part for part, _ in drawing.parts)
    assert whole.startswith("<|im_start|>")
    assert whole.endswith("assistant\n")
    named, _ = explain(tiny_model, "Who weighs?", FormatConfig(), Wanted(target="The steelyard.", nearest=3, rows=rows))
    assert named.nearest is not None
    assert named.nearest[0].line == 1, "the very row"
    assert named.nearest[0].cosine > 0.5
    cut = {"messages": [{"role": "user", "content": "so " * 600}, {"role": "assistant", "content": "on"}]}
    rows.write_text(json.dumps(cut) + "\n" + rows.read_text())
    named, _ = explain(tiny_model, "Who weighs?", FormatConfig(), Wanted(target="The steelyard.", nearest=3, rows=rows))
    assert named.nearest is not None
    assert {near.line for near in named.nearest} == {2, 3, 4}, "of the first, nothing that was learnt is left"
    assert named.nearest[0].line == 2, "and the others keep their names"
    rows.write_text('{"text": "Nobody is asked."}\n')
    with pytest.raises(ConfigError, match="plain text"):
        explain(tiny_model, "Who?", FormatConfig(), Wanted(target="x", nearest=1, rows=rows))


def test_an_image_by_its_patches(tmp_path: Path) -> None:
    done = train(drawn.configuration(tmp_path, network=drawn.VIT, epochs=10))
    held = drawn.draw(tmp_path / "held", 4, 1)
    image = next((held / "spots").glob("*.png"))
    found, drawing = explain(Path(str(done.path)), str(image), FormatConfig(), Wanted(target="spots"))
    accounts(found)
    assert found.kinds.keys() == {"image"}
    assert len(found.units) == 16
    html = page(Path("m"), found, drawing).html()
    assert html.count("<rect") >= 16 + 12 * 12
    with pytest.raises(ConfigError, match="no file"):
        explain(Path(str(done.path)), "what is this?", FormatConfig(), Wanted())
    with pytest.raises(ConfigError, match="--nearest"):
        explain(Path(str(done.path)), str(image), FormatConfig(), Wanted(nearest=1))


def test_a_row_of_several_kinds(tmp_path: Path) -> None:
    done = train(several_kinds.configuration(tmp_path, epochs=2))
    rows = several_kinds.write_rows(tmp_path / "held", 20, 3)
    whole = next(
        number
        for number, line in enumerate(rows.read_text().splitlines(), 1)
        if {"text", "image", "audio"} <= json.loads(line).keys()
    )
    found, drawing = explain(Path(str(done.path)), str(rows), FormatConfig(), Wanted(row=whole))
    accounts(found)
    assert found.kinds.keys() == {"text", "image", "audio"}
    html = page(Path("m"), found, drawing).html()
    for title in ("the text", "the image", "the sound", "by kind"):
        assert title in html
    with pytest.raises(ConfigError, match="20 rows"):
        explain(Path(str(done.path)), str(rows), FormatConfig(), Wanted(row=21))


def test_what_is_not_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        explain(tmp_path, "x", FormatConfig(), Wanted())


def test_the_verb(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["explain", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    why = tmp_path / "why.html"
    code, out, err = run("today it was frost", "--model", learnt, "--page", why, "--json")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["target"], told["method"]) == ("cold", "lrp")
    assert why.read_text().startswith("<!doctype html>")
    code, out, _ = run("today it was frost", "--model", learnt, "--nearest", 2)
    assert code == 0
    assert "deletion" in out
    assert out.count("line ") == 2
    code, _, err = run("frost", "--model", learnt, "--target", "mild", "--page", tmp_path / "none.html")
    assert code == 2
    assert "cold, warm" in err
    assert not (tmp_path / "none.html").exists()
