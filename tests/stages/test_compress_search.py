"""A search over a tiny model: what is chosen meets the target, is a checkpoint, and its recipe makes it anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steelyard import config as configuration
from steelyard.checkpoint import manifest
from steelyard.cli import main
from steelyard.cli.compress import app
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import CheckpointError, ConfigError
from steelyard.infer import speed
from steelyard.models import weights
from steelyard.models.linear import QuantizedLinear
from steelyard.stages.compress import quantize
from steelyard.stages.compress_search import Search
from steelyard.stages.recipe import Recipe, follow


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for name, first in (("rows", 0), ("held", 100)):
        path = tmp_path / f"{name}.jsonl"
        texts = [f"The user asks {first + number} times, and {number} more." for number in range(40)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made.append(path)
    return made[0], made[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured once."""
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setitem(speed.measure.__kwdefaults__, "rounds", 1)


def sizes(model: Path, folder: Path, rows: Path) -> dict[int, int]:
    """Bytes of the forms of 4 and 8 bits."""
    found = {}
    for bits in (4, 8):
        config = QuantizeConfig.chosen(bits, None, None, rows=True)
        quantize(model, folder / str(bits), config, data=rows, accept=True)
        found[bits] = (folder / str(bits) / "model.safetensors").stat().st_size
    return found


def test_between_four_bits_and_eight(tiny_model: Path, tmp_path: Path, files: tuple[Path, Path]) -> None:
    """A size that int8 is over, with less lost than int4 loses: some layers keep 8 bits."""
    known = sizes(tiny_model, tmp_path, files[0])
    between = (known[4] + known[8]) / 2
    output = tmp_path / "searched"
    first = Search(tiny_model, output, f"size<={between / 1e3:.2f}kB", *files).run()
    assert first.chosen == "int4", "the usual forms are enough"
    four = next(point for point in first.points if point.name == "int4").measures["loss"]
    target = f"size<={between / 1e3:.2f}kB,loss<={four - 0.002:.4f}"
    found = Search(tiny_model, output, target, *files).run()
    assert [point.name for point in found.points[:4]] == [point.name for point in first.points]
    assert found.chosen is not None
    assert " layers int8" in found.chosen
    chosen = next(point for point in found.points if point.name == found.chosen)
    assert chosen.measures["size"] <= between
    assert chosen.measures["loss"] <= four - 0.002
    assert chosen.loss_interval[0] <= chosen.measures["loss"] <= chosen.loss_interval[1]
    manifest.verify(output / "best")
    layers = [
        layer for layer in weights.load(output / "best").model.layers.modules() if isinstance(layer, QuantizedLinear)
    ]
    assert {layer.bits for layer in layers} == {4, 8}
    told: list[str] = []
    again = Search(tiny_model, output, target, *files, showing=lambda what: told.append(what)).run()  # type: ignore[arg-type, func-returns-value]
    assert not told
    assert again.chosen == found.chosen
    assert len(again.points) == len(found.points)
    shutil.rmtree(output / "forms")
    third = Search(tiny_model, output, f"size<={between / 1e3:.2f}kB", *files).run()
    assert len(third.points) == len(found.points), "nothing is measured twice, though the form has to be made again"
    assert manifest.verify(output / "best").id
    Search(tiny_model, output, target, *files).run()
    made = configuration.load(output / "recipe.toml", Recipe, [f"output={tmp_path / 'made'}"])
    follow(made, accept=True)
    assert manifest.read(tmp_path / "made").id == manifest.read(output / "best").id
    assert found.chosen in (output / "search.html").read_text()


def test_what_none_meets(tiny_model: Path, tmp_path: Path, files: tuple[Path, Path]) -> None:
    output = tmp_path / "searched"
    named = ["-o", str(output), "--data", str(files[0]), "--held", str(files[1])]
    with pytest.raises(SystemExit) as ended:
        main(["compress", "search", str(tiny_model), *named, "--target", "size<=0.1x,loss<=0.1%", "--json"])
    assert ended.value.code == 9
    assert not (output / "best").exists()
    page = (output / "search.html").read_text()
    assert "None of these meets" in page
    known: Any = json.loads((output / "search.json").read_text())
    assert [point["name"] for point in known["points"][1:4]] == ["int8, by channel", "int8, by group", "int4"]
    assert known["points"][-1]["name"] == "int4, 1 of 2 blocks"


def test_a_comparison(tiny_model: Path, tmp_path: Path, files: tuple[Path, Path]) -> None:
    arguments = ["search", str(tiny_model), "-o", str(tmp_path / "s"), "--data", str(files[0]), "--held", str(files[1])]
    told = CliRunner().invoke(app, [*arguments, "--explain"])
    assert told.exit_code == 0, told.output
    for word in ("as it is", "tokens per", "For size:", "For accuracy:"):
        assert word in " ".join(told.output.split())
    assert ' layers int8"' in (tmp_path / "s" / "search.json").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text(files[1].read_text() + files[1].read_text())
    with pytest.raises(ConfigError, match="is of another model or other rows"):
        Search(tiny_model, tmp_path / "s", "", files[0], other)


def test_what_cannot_be_searched(tiny_model: Path, tmp_path: Path, files: tuple[Path, Path]) -> None:
    quantize(tiny_model, tmp_path / "small", accept=True)
    with pytest.raises(CheckpointError, match="quantised already"):
        Search(tmp_path / "small", tmp_path / "s", "", *files)
    with pytest.raises(ConfigError, match="no counter of energy"):
        Search(tiny_model, tmp_path / "s", "energy<=0.5x", *files)
    with pytest.raises(ConfigError, match="holds no search"):
        Search(tiny_model, tmp_path, "", *files)
    assert not (tmp_path / "s").exists()
