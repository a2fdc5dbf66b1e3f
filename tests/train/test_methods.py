"""What a run may be told besides its optimizer: averages, an early end, layers that learn later or never."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONSTANT, base, decoder_of, token_rows, trainer

from steelyard.compress.prune.decoders import PruneConfig, prune
from steelyard.errors import ConfigError
from steelyard.models import weights
from steelyard.train.config import DataConfig, TrainConfig, check
from steelyard.train.networks import EncoderNetwork
from steelyard.train.optimizers import OPTIMIZERS, OptimizerConfig
from steelyard.train.optimizers.groups import GroupConfig
from steelyard.train.trainer import Trainer

__all__ = ["base"]  # a fixture


def stopped_at(ours: Trainer, step: int) -> None:
    ours.fit(lambda progress: setattr(ours, "stopping", progress.step >= step))
    ours.run.close()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ema"])
def test_an_interrupted_run_ends_the_same(base: Path, tmp_path: Path, name: str) -> None:
    """Whatever the optimizer remembers comes back to the bit."""
    fields: dict[str, Any] = {"batch_size": 0 if name == "gd" else 3, "epochs": 6, "checkpoint_every": 2}
    if name == "ema":
        fields["ema"] = 0.9
    else:
        fields["optimizer"] = OptimizerConfig(name=name, learning_rate=1e-3)
    rows = token_rows(6)
    straight = trainer(base, tmp_path / "straight", rows, **fields)
    assert straight.fit()
    first = trainer(base, tmp_path / "cut", rows, **fields)
    stopped_at(first, 3)
    second = trainer(base, tmp_path / "cut", rows, **fields)
    assert second.fit()
    assert second.first == 3
    for kept in ("best", "last"):
        found, expected = (weights.read_tensors(tmp_path / run / kept) for run in ("cut", "straight"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found), kept
    for key, master in straight.masters.items():
        assert torch.equal(master, second.masters[key])


def test_the_average_is_what_is_measured_and_kept(base: Path, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    masters: list[dict[str, torch.Tensor]] = []

    def evaluator(decoder: torch.nn.Module, adapter: object) -> Mapping[str, float]:
        seen.append({name: tensor.detach().clone() for name, tensor in decoder.named_parameters()})
        return {"validation_loss": 1.0}

    ours = trainer(base, tmp_path, token_rows(6), evaluator, ema=0.5, batch_size=3, epochs=3, evaluate_every=6)
    began = {name: master.clone() for name, master in ours.masters.items()}
    ours.fit(lambda progress: masters.append({name: master.clone() for name, master in ours.masters.items()}))
    expected = began
    for step, after in enumerate(masters, 1):
        share = max(0.5, 1 / (step + 1))
        expected = {name: (1 - share) * expected[name] + share * after[name] for name in expected}
    (measured,) = seen
    kept = weights.read_tensors(tmp_path / "best")
    for name, average in expected.items():
        torch.testing.assert_close(measured[name], average, atol=1e-6, rtol=1e-5)
        assert torch.equal(kept[name], measured[name])
        assert torch.equal(ours.masters[name], masters[-1][name]), "what learns is what it was"
        assert torch.equal(ours.parameters[name].detach(), masters[-1][name])


def test_schedule_free_keeps_its_average(base: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(name="schedule-free", learning_rate=1e-2)
    ours = trainer(base, tmp_path, token_rows(6), optimizer=optimizer, batch_size=3, epochs=3)
    ours.fit()
    kept = weights.read_tensors(tmp_path / "last")
    for name, master in ours.masters.items():
        torch.testing.assert_close(kept[name], ours.optimizer.state[master]["average"])
        assert not torch.equal(kept[name], master)


def test_a_run_that_gets_no_better_ends(base: Path, tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.0, 2.2, 1.0, 0.5])

    def evaluator(decoder: object, adapter: object) -> Mapping[str, float]:
        return {"validation_loss": next(scores)}

    fields: dict[str, Any] = {"batch_size": 2, "epochs": 10, "evaluate_every": 1, "patience": 3}
    ours = trainer(base, tmp_path, token_rows(4), evaluator, **fields)
    assert ours.fit(), "that is an end"
    assert ours.step == 5, "2.0 was the best; three were no better, an equal one among them"
    assert ours.best == 2.0
    assert "no better for 3 evaluations" in (tmp_path / "log.txt").read_text()
    ours.run.close()
    again = trainer(base, tmp_path, token_rows(4), evaluator, **fields)
    assert again.fit()
    assert again.step == 5


def test_what_is_frozen_stays_and_what_is_later_begins_later(base: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(
        learning_rate=1e-2,
        weight_decay=0.1,
        unfreeze_epochs=1.0,
        groups=(GroupConfig(match="embed_tokens", scale=0.0),),
    )
    ours = trainer(base, tmp_path, token_rows(4), optimizer=optimizer, batch_size=4, epochs=2, schedule=CONSTANT)
    before = {name: master.clone() for name, master in ours.masters.items()}
    changed: list[set[str]] = []

    def report(progress: object) -> None:
        changed.append({name for name, master in ours.masters.items() if not torch.equal(master, before[name])})

    ours.fit(report)
    layers = decoder_of(ours).config.layers
    top = {name for name in before if f"layers.{layers - 1}." in name}
    above = {name for name in before if "layers." not in name and "embed" not in name}
    assert changed[0] == above
    assert changed[1] == above | top


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"ema": 1.0}, "ema must be"),
        ({"ema": 0.9, "optimizer": OptimizerConfig(name="schedule-free")}, "average of its own"),
        ({"patience": -1}, "patience must be"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(TrainConfig(model="m", output="o", data=DataConfig(train="t"), **fields))


def test_what_is_not_finite_is_rolled_back(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the full rate the fourth step has no finite loss: the run goes on from its last state at half of it."""
    fields: dict[str, Any] = {"batch_size": 2, "epochs": 4, "checkpoint_every": 2, "schedule": CONSTANT}
    ours = trainer(base, tmp_path, token_rows(4), **fields)
    whole, rates = ours.task.loss, []

    def breaking(rows: Any) -> torch.Tensor:
        loss = whole(rows)
        return loss * float("nan") if ours.step == 3 and ours.scale == 1.0 else loss

    monkeypatch.setattr(ours.task, "loss", breaking)
    assert ours.fit(lambda progress: rates.append((progress.step, progress.learning_rate)))
    full = rates[0][1]
    assert rates == [(1, full), (2, full), (3, full), *((step, full / 2) for step in range(3, 9))]
    log = (tmp_path / "log.txt").read_text()
    assert "the loss is nan at step 4: back to step 2, from now on with 0.5 of the learning rate" in log
    assert [point["step"] for point in ours.run.metrics() if "loss" in point] == list(range(1, 9))
    assert all(bool(master.isfinite().all()) for master in ours.masters.values())


def test_a_divergence_is_rolled_back_and_the_rest_is_the_same_after_a_kill(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"batch_size": 2, "epochs": 10, "checkpoint_every": 3, "schedule": CONSTANT}

    def made(folder: Path) -> Trainer:
        ours = trainer(base, folder, token_rows(4), **fields)
        whole = ours.task.loss
        monkeypatch.setattr(
            ours.task, "loss", lambda rows: whole(rows) * (50 if ours.step >= 8 and ours.scale == 1.0 else 1)
        )
        return ours

    straight = made(tmp_path / "straight")
    assert straight.fit()
    assert straight.scale == 0.5
    log = (tmp_path / "straight" / "log.txt").read_text()
    assert "for 5 steps at step 9: back to step 6" in log
    cut = made(tmp_path / "cut")
    stopped_at(cut, 11)  # while it goes wrong
    again = made(tmp_path / "cut")
    stopped_at(again, 14)  # after it went back
    last = made(tmp_path / "cut")
    assert last.fit()
    assert all(torch.equal(straight.masters[name], master) for name, master in last.masters.items())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ema"])
def test_what_was_pruned_stays_so(base: Path, tmp_path: Path, name: str) -> None:
    """Zeros stay zeros whatever the optimizer, what is left learns, and is stored as it was."""
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    decoder = weights.load(base, torch.float32)
    prune(decoder, PruneConfig(method="magnitude"))
    weights.save(decoder, pruned, base, zeros=False)
    fields: dict[str, Any] = {"batch_size": 0 if name == "gd" else 3, "epochs": 2, "keep_zeros": True}
    if name == "ema":
        fields["ema"] = 0.9
    else:
        fields["optimizer"] = OptimizerConfig(name=name, learning_rate=1e-2)
    assert trainer(pruned, tmp_path / "run", token_rows(6), **fields).fit()
    before, after = (weights.read_tensors(folder) for folder in (pruned, tmp_path / "run" / "last"))
    linear = [key for key in before if key.endswith("_proj.weight")]
    for key in linear:
        zeros = before[key] == 0
        assert float(zeros.float().mean()) == pytest.approx(0.5, abs=0.01)
        assert not after[key][zeros].any(), key
        assert float((after[key] == before[key])[~zeros].float().mean()) < 0.5, key
    assert weights.is_sparse(tmp_path / "run" / "last")


def test_zeros_are_kept_of_a_model_alone() -> None:
    plain: dict[str, Any] = {"output": "run", "data": DataConfig(train="rows.jsonl"), "keep_zeros": True}
    for fields in ({"model": "base"}, {"task": "masked", "network": EncoderNetwork()}):
        with pytest.raises(ConfigError, match="keep_zeros is for all weights of a pruned model"):
            check(TrainConfig(**plain, **fields))
    check(TrainConfig(**plain, model="base", method="full"))
