"""Decoders taught by larger ones: the loss and its gradients against float64, and a smaller one that comes nearer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steelyard.compress.prune.decoders import PruneConfig
from steelyard.data.rows import TokenRow
from steelyard.data.token_rows import TokenRows
from steelyard.errors import ConfigError
from steelyard.models import head_tokens, weights
from steelyard.models.attention import PackedAttention
from steelyard.stages.compress import prune
from steelyard.stages.train import train
from steelyard.text.tokenizer import Tokenizer
from steelyard.train import student
from steelyard.train.config import DataConfig, DistillConfig, TrainConfig
from steelyard.train.language_model import LanguageModelling
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.student import Student, held_to


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize(("count", "weight"), [(1, 0.5), (7, 1.0), (20, 0.3)])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, kind: Any, count: int, weight: float) -> None:
    monkeypatch.setattr(student, "CHUNK", 6)
    draw = torch.Generator().manual_seed(count)
    states, head, theirs, their_head = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((count, 8), (30, 8), (count, 12), (30, 12))
    )
    targets = torch.randint(30, (count,), generator=draw)
    wide = [tensor.clone().requires_grad_() for tensor in (states, head)]
    logits, other = wide[0] @ wide[1].T, theirs @ their_head.T
    q, p = (x.div(2.0).log_softmax(-1) for x in (logits, other))
    if kind == "jensen-shannon":
        middle = ((p.exp() + q.exp()) / 2).log()
        far = (kl(p, middle) + kl(q, middle)) / 2
    else:
        far = kl(p, q) if kind == "forward" else kl(q, p)
    expected = ((1 - weight) * F.cross_entropy(logits, targets, reduction="none") + weight * 4 * far).sum()
    (expected * 3).backward()  # type: ignore[no-untyped-call]
    own = [tensor.float().requires_grad_() for tensor in (states, head)]
    found = held_to(*own, theirs.float(), their_head.float(), targets, weight, 2.0, kind)  # type: ignore[misc]
    (found * 3).backward()  # type: ignore[no-untyped-call]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for ours, reference in zip(own, wide, strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def rows(path: Path) -> Path:
    texts = [f"The user asks {number} times, and the answer is {number * 7 % 11}." for number in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def far(teacher: Path, pupil: Path) -> float:
    """Mean KL over a text that was not learnt."""
    text = "The user asks 90 times, and the answer is 5. The user asks 91 times."
    token_ids = torch.tensor(Tokenizer.load(teacher).encode_plain(text)[:40])
    length = len(token_ids)
    found = []
    for folder in (teacher, pupil):
        decoder = weights.load(folder, torch.float32)
        with torch.no_grad():
            states = decoder(token_ids, torch.arange(length), PackedAttention([length]))
            found.append(decoder.logits(states).log_softmax(-1))
    return float(kl(*found).mean())


def test_the_states_are_held_to_the_teachers(tiny_model: Path, tmp_path: Path) -> None:
    """The loss is greater by 1 - cos of both states at every trained token."""
    cut = tmp_path / "cut"
    prune(tiny_model, cut, PruneConfig(method="even", structure="blocks", rate=0.5), accept=True)
    teacher, pupil = (weights.load(folder, torch.float32) for folder in (tiny_model, cut))
    tokens = TokenRows.of([TokenRow(tokens=[3, 4, 5, 6, 7], trained=[False, True, True, False, True])])
    losses = []
    for hidden in (0.0, 2.0):
        how = {"weight": 0.5, "temperature": 1.0, "hidden": hidden}
        task = Student(pupil, None, tokens, cut, teacher=teacher, kind="forward", **how)
        losses.append(float(task.loss([0])))
    with torch.no_grad():
        ids = torch.tensor([3, 4, 5, 6, 7])
        states = [model(ids, torch.arange(5), PackedAttention([5]))[[0, 1, 3]].double() for model in (pupil, teacher)]
    expected = 2 * float((1 - F.cosine_similarity(*states, dim=-1)).sum())
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_draft_learns_its_own_tokens_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Against the same losses over the few logits, of the targets that are among them."""
    cut = tmp_path / "cut"
    prune(tiny_model, cut, PruneConfig(method="even", structure="blocks", rate=0.5), accept=True)
    kept = [2, 3, 5, 6, 9]
    head_tokens.write(cut, kept)
    teacher, pupil = (weights.load(folder, torch.float32) for folder in (tiny_model, cut))
    ids = [3, 4, 5, 6, 7]
    tokens = TokenRows.of([TokenRow(tokens=ids, trained=[False, True, True, True, True])])
    plain = float(LanguageModelling(pupil, None, tokens, cut).loss([0]))
    how = {"weight": 0.5, "temperature": 1.0}
    taught = float(Student(pupil, None, tokens, cut, teacher=teacher, kind="forward", **how).loss([0]))
    with torch.no_grad():
        given = torch.tensor(ids), torch.arange(5), PackedAttention([5])
        q, p = (x.logits(x(*given)[[1, 2]])[:, kept].double().log_softmax(-1) for x in (pupil, teacher))
    own = -(q[0, 2] + q[1, 3])
    assert plain == pytest.approx(float(own), rel=1e-4)
    assert taught == pytest.approx(float(own / 2 + kl(p, q).sum() / 2), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_cut_off_is_learnt_again(tiny_model: Path, tmp_path: Path, method: Any) -> None:
    texts, cut = rows(tmp_path / "rows.jsonl"), tmp_path / "cut"
    prune(tiny_model, cut, PruneConfig(method="activation", structure="neurons", rate=0.3), data=texts, accept=True)
    config = TrainConfig(
        model=str(cut),
        output=str(tmp_path / "run"),
        data=DataConfig(train=str(texts), holdout=0, deduplicate=False),
        method=method,
        epochs=8,
        batch_size=8,
        dtype="float32",
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3),
        distill=DistillConfig(teacher=str(tiny_model), weight=1.0, temperature=1.0),
    )
    done = train(config)
    assert done.path is not None
    if method == "full":
        assert far(tiny_model, Path(done.path)) < 0.7 * far(tiny_model, cut)
    else:
        assert (Path(done.path) / "adapter_config.json").is_file()


def test_a_teacher_has_to_know_the_tokens(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    config = TrainConfig(
        model=str(tiny_model),
        output=str(tmp_path / "run"),
        data=DataConfig(train=str(rows(tmp_path / "rows.jsonl")), holdout=10),
        distill=DistillConfig(teacher=str(other)),
    )
    with pytest.raises(ConfigError, match="has another tokenizer"):
        train(config)
