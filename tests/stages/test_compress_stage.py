"""A compressed checkpoint appears with its certificate and lineage, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from steelyard.checkpoint import manifest
from steelyard.compress.inputs import linears
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize import grid
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.compress.quantize.grid import Integers
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, FidelityError
from steelyard.evaluate.certificate import Certificate, Thresholds
from steelyard.models.opening import open_checkpoint
from steelyard.stages.certify import sign_off
from steelyard.stages.compress import CALIBRATION, prune, quantize
from steelyard.stages.evaluate import Likelihood, evaluate

LOOSE = Thresholds(bits_per_byte=0.5)


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight comes out four times too large."""
    whole = grid.rounded

    def broken(*given: Any) -> Integers:
        values, scale = whole(*given)
        return Integers(values, scale * 4)

    monkeypatch.setattr(grid, "rounded", broken)


def test_what_passes_is_written_with_certificate_and_lineage(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    found = quantize(tiny_model, output, thresholds=LOOSE)
    written = manifest.verify(output)
    assert found.passed
    assert written.certificate == json.loads(msgspec.json.encode(found))
    assert written.parent == found.parent == manifest.read(tiny_model).id
    assert written.id != written.parent
    assert written.recipe["compress"] == json.loads(msgspec.json.encode(QuantizeConfig()))
    assert found.bytes_after < found.bytes_before
    assert open_checkpoint(output).template is not None
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(output, tmp_path / "smaller")


@pytest.mark.usefixtures("damaged")
def test_a_damaged_model_is_not_handed_on(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FidelityError, match="past its thresholds"):
        quantize(tiny_model, tmp_path / "small", thresholds=LOOSE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("damaged")
def test_accepted_it_is_written_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    found = quantize(tiny_model, tmp_path / "small", thresholds=LOOSE, accept=True)
    assert (found.passed, found.accepted) == (False, True)
    certificate = manifest.verify(tmp_path / "small").certificate
    assert certificate is not None
    assert (certificate["passed"], certificate["accepted"]) == (False, True)


def test_an_output_that_is_something_else_stays(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tiny_model):
        before = sorted(path.name for path in output.iterdir())
        with pytest.raises(ConfigError, match="name another folder"):
            quantize(tiny_model, output, thresholds=LOOSE)
        assert sorted(path.name for path in output.iterdir()) == before


def test_what_cannot_be_compressed(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        quantize(tmp_path / "none", tmp_path / "small")


@pytest.mark.parametrize("method", ["smoothquant", "awq", "gptq"])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, 16)])
def test_judged_by_rows(tiny_model: Path, tmp_path: Path, method: Any, bits: Any, group: int | None) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(30)))
    told: list[tuple[int, int]] = []
    output = tmp_path / "small"
    config = QuantizeConfig(bits=bits, group=group, method=method)
    settings: dict[str, Any] = {"data": rows, "thresholds": LOOSE, "accept": True}
    quantize(tiny_model, output, config, report=lambda done, of: told.append((done, of)), **settings)
    written = manifest.verify(output)
    assert written.recipe["compress"] == {**json.loads(msgspec.json.encode(config)), "tokens": 16384}
    assert written.data["calibration: rows.jsonl"] == manifest.sha256_file(rows)
    layers = len(open_checkpoint(output).decoder.model.layers)
    assert told[:layers] == [(number + 1, layers) for number in range(layers)]
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(output, tmp_path / "other", config, **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("config", "rows", "settings", "complaint"),
    [
        (QuantizeConfig(method="gptq"), False, {}, "gptq judges by what layers read: give it rows"),
        (QuantizeConfig(), True, {}, "nearest reads no data"),
        (QuantizeConfig(), False, {"tokens": 5}, "tokens are those of rows"),
        (QuantizeConfig(method="awq"), True, {"tokens": 0}, "0 tokens to judge by"),
        (QuantizeConfig(method="smoothquant", strength=1.1), True, {}, "strength 1.1"),
        (QuantizeConfig(strength=0.9), False, {}, "strength is smoothquant's: nearest has none"),
        (QuantizeConfig(group=24), False, {}, "group 24: a multiple of 16"),
        (QuantizeConfig(group=80), False, {}, "group 80 does not divide the .* inputs of '.*'; groups that do: 16"),
        (QuantizeConfig(group=16, portable=True), False, {}, "leave out the group"),
        (QuantizeConfig(int8_layers=("*.down_proj",)), False, {}, "set bits to 4"),
        (QuantizeConfig(bits=4, group=16, int8_layers=("*.v_proj",), portable=True), False, {}, "all or none"),
        (QuantizeConfig(group=16, group_layers=("*.v_proj",)), False, {}, "group_layers: of q_proj.* all or none$"),
        (QuantizeConfig(group_layers=("*.down_proj",)), False, {}, "set bits to 8, and a group"),
        (QuantizeConfig(bits=4, group=16, group_layers=("*.down_proj",)), False, {}, "set bits to 8, and a group"),
        (QuantizeConfig(group=16, group_layers=("head",)), False, {}, "no linear layer is 'head'"),
        (QuantizeConfig(group=16, method="awq", group_layers=("*.down_proj",)), True, {}, "awq judges all layers"),
        (
            QuantizeConfig(bits=4, group=16, int8_layers=("head",)),
            False,
            {},
            "no linear layer is 'head'; one is 'model",
        ),
    ],
)
def test_what_does_not_go_together(
    tiny_model: Path, tmp_path: Path, config: QuantizeConfig, rows: bool, settings: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "The user asks."}) + "\n")
    with pytest.raises(ConfigError, match=complaint):
        quantize(tiny_model, tmp_path / "small", config, data=path if rows else None, thresholds=LOOSE, **settings)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_pruned_model(tiny_model: Path, tmp_path: Path, method: Any, pattern: str | None) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(30)))
    output = tmp_path / "pruned"
    config = PruneConfig(method=method, pattern=pattern)
    given = None if method == "magnitude" else rows
    found = prune(tiny_model, output, config, data=given, thresholds=LOOSE, accept=True)
    written = manifest.verify(output)
    read = {"tokens": CALIBRATION} if given else {}
    assert written.recipe["compress"] == {**json.loads(msgspec.json.encode(config)), **read}
    assert written.data.get("calibration: rows.jsonl") == (manifest.sha256_file(rows) if given else None)
    before, after = open_checkpoint(tiny_model).decoder, open_checkpoint(output).decoder
    for name, layer in linears(after.model.layers).items():
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01), name
        if pattern is not None:
            assert ((layer.weight.view(-1, 4) == 0).sum(1) >= 2).all()
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    linear = sum(2 * layer.weight.numel() for layer in linears(after.model.layers).values())
    assert found.bytes_after == pytest.approx(found.bytes_before - linear * (0.5 - 1 / 16), rel=0.08)
    dense = tmp_path / "dense"
    prune(tiny_model, dense, config, data=given, thresholds=LOOSE, accept=True, zeros=True)
    other = open_checkpoint(dense).decoder.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in after.state_dict().items())


def test_judging_needs_rows(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        prune(tiny_model, tmp_path / "pruned", PruneConfig(method="wanda"))
    with pytest.raises(ConfigError, match="reads no data"):
        prune(tiny_model, tmp_path / "pruned", PruneConfig(method="magnitude"), data=tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantised_is_not_pruned(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "small", thresholds=LOOSE)
    with pytest.raises(CheckpointError, match="quantised already"):
        prune(tmp_path / "small", tmp_path / "pruned", PruneConfig(method="magnitude"), accept=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_tasks_are_compared(tiny_model: Path, tmp_path: Path) -> None:
    """A task may lose where general text does not: it is judged apart."""
    labelled, plain = tmp_path / "labelled.jsonl", tmp_path / "plain.jsonl"
    lines = [{"text": f"Number {number}.", "label": ("odd", "even")[number % 2]} for number in range(12)]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(12)))
    found = quantize(tiny_model, tmp_path / "small", tasks=[labelled, plain], thresholds=LOOSE, accept=True)
    assert isinstance(found, Certificate)
    assert {name: delta.measure for name, delta in found.tasks.items()} == {
        "labelled.jsonl": "accuracy",
        "plain.jsonl": "loss",
    }
    for checkpoint, side in ((tiny_model, "before"), (tmp_path / "small", "after")):
        measured = evaluate(checkpoint, plain, FormatConfig())
        assert isinstance(measured, Likelihood)
        assert getattr(found.tasks["plain.jsonl"], side) == measured.loss
    assert "plain.jsonl: loss" in found.summary()
    strict = msgspec.structs.replace(LOOSE, task=-1.0)
    with pytest.raises(FidelityError, match="of a task's accuracy"):
        quantize(tiny_model, tmp_path / "other", tasks=[plain], thresholds=strict)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match=r"are called 'plain\.jsonl'"):
        quantize(tiny_model, tmp_path / "other", tasks=[plain, plain], thresholds=LOOSE)


def test_somebody_signs(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "small", thresholds=LOOSE, accept=True)
    before = manifest.read(tmp_path / "small")
    sign_off(tmp_path / "small", " Ada ", "read")
    sign_off(tmp_path / "small", "Grace")
    after = manifest.verify(tmp_path / "small")
    assert after.id == before.id
    assert after.certificate is not None
    signed = msgspec.convert(after.certificate, Certificate).sign_offs
    assert [(each.by, each.note) for each in signed] == [("Ada", "read"), ("Grace", "")]
    with pytest.raises(ConfigError, match="say who"):
        sign_off(tmp_path / "small", " ")
    with pytest.raises(CheckpointError, match="no certificate"):
        sign_off(tiny_model, "Ada")
    (tmp_path / "small" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="altered"):
        sign_off(tmp_path / "small", "Ada")
