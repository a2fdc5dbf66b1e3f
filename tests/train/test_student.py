"""Decoders taught by larger ones: the loss and its gradients against float64, and a smaller one that comes nearer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from interrupted import ends_the_same
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.data.rows import TokenRow
from steelyard.data.token_rows import TokenRows
from steelyard.errors import ConfigError
from steelyard.models import head_tokens, weights
from steelyard.models.attention import PackedAttention
from steelyard.stages.compress import prune
from steelyard.stages.tasks import teacher_memory
from steelyard.stages.train import train
from steelyard.text.tokenizer import Tokenizer
from steelyard.train import soft_targets
from steelyard.train.config import DataConfig, DistillConfig, TrainConfig
from steelyard.train.language_model import LanguageModelling
from steelyard.train.lora import LoraConfig
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.soft_targets import held_to, of_likeliest, of_teacher
from steelyard.train.student import Student, beginning


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize(("count", "weight"), [(1, 0.5), (7, 1.0), (20, 0.3)])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, kind: Any, count: int, weight: float) -> None:
    monkeypatch.setattr(soft_targets, "CHUNK", 6)
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
    far_from = of_teacher(theirs.float(), their_head.float(), kind, 2.0)
    found = held_to(own[0], own[1], targets, far_from, torch.full((count,), weight), torch.ones(count))
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
        how = DistillConfig(teacher="", weight=0.5, temperature=1.0, hidden=hidden)
        task = Student(pupil, None, tokens, cut, teacher=teacher, how=how)
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
    how = DistillConfig(teacher="", weight=0.5, temperature=1.0)
    taught = float(Student(pupil, None, tokens, cut, teacher=teacher, how=how).loss([0]))
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


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_what_is_kept_of_a_teacher(kind: Any) -> None:
    """All other tokens count as one, in float64; where all but one are kept nothing is lost."""
    draw = torch.Generator().manual_seed(3)
    theirs, ours = (2 * torch.randn(9, 30, generator=draw) for _ in range(2))
    p, q = (x.double().div(2.0).softmax(-1) for x in (theirs, ours))
    order = p.argsort(1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    for count in (1, 4, 29, 500):
        most = min(count, 29)
        few = [torch.cat([x[:, :most], x[:, most:].sum(1, keepdim=True)], 1).log() for x in (p, q)]
        if kind == "jensen-shannon":
            middle = ((few[0].exp() + few[1].exp()) / 2).log()
            expected = (kl(few[0], middle) + kl(few[1], middle)) / 2
        else:
            expected = kl(*few) if kind == "forward" else kl(few[1], few[0])
        kept = soft_targets.likeliest(theirs, count, 2.0)
        assert kept.tokens.shape == (9, most)
        found = of_likeliest(kept, kind, 2.0)(slice(2, 9), ours[2:])
        torch.testing.assert_close(found.double(), 4 * expected[2:], rtol=1e-4, atol=1e-5)
    full = soft_targets.of_teacher(theirs, torch.eye(30), kind, 2.0)(slice(0, 9), ours)
    torch.testing.assert_close(of_likeliest(kept, kind, 2.0)(slice(0, 9), ours), full, rtol=1e-4, atol=1e-5)


def test_the_states_after_blocks_are_held_too(tiny_model: Path) -> None:
    """Against the states of both, block after block."""
    teacher, pupil = (weights.load(tiny_model, torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in pupil.parameters():
            parameter.mul_(1.1)
    ids, trained = [3, 4, 5, 6, 7], [False, True, True, False, True]
    tokens = TokenRows.of([TokenRow(tokens=ids, trained=trained)])
    losses = []
    for layers in (0, 1):
        how = DistillConfig(teacher="", weight=0.5, hidden=2.0, layers=layers)
        losses.append(float(Student(pupil, None, tokens, tiny_model, teacher=teacher, how=how).loss([0])))
    found = []
    for model in (pupil, teacher):
        with torch.no_grad():
            positions = torch.arange(5)
            x = model.embed(torch.tensor(ids))
            for block in list(model.model.layers)[: len(model.model.layers) // 2]:
                x = block(x, model.rotary(positions), PackedAttention([5]), None)
            found.append(x[[0, 1, 3]].double())
    expected = 2 * float((1 - F.cosine_similarity(*found, dim=-1)).sum())
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


def test_what_a_row_asks() -> None:
    chat = TokenRow(tokens=list(range(8)), trained=[False, True, True, False, False, True, True, False])
    assert beginning(chat) == [0, 1, 2, 3, 4]
    text = TokenRow(tokens=list(range(100)), trained=[False] + [True] * 99)
    assert beginning(text) == list(range(32))
    assert beginning(TokenRow(tokens=[5, 6], trained=[False, True])) == [5]


def taught(folder: Path, base: Path, model: Path, **distill: Any) -> TrainConfig:
    """A run by a teacher; what is not distillation's is the run's."""
    method, lora = distill.pop("method", "full"), distill.pop("lora", LoraConfig())
    return TrainConfig(
        model=str(model),
        output=str(folder / "run"),
        data=DataConfig(train=str(rows(folder / "rows.jsonl")), deduplicate=False),
        method=method,
        lora=lora,
        epochs=distill.pop("epochs", 2),
        batch_size=8,
        checkpoint_every=4,
        dtype="float32",
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3),
        distill=DistillConfig(teacher=str(base), temperature=1.0, **distill),
    )


@pytest.fixture
def cut(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a third of its neurons gone."""
    texts, folder = rows(tmp_path / "rows.jsonl"), tmp_path / "cut"
    prune(tiny_model, folder, PruneConfig(method="activation", structure="neurons", rate=0.3), data=texts, accept=True)
    return folder


@pytest.mark.parametrize(
    "distill",
    [{"keep": 8}, {"own": 0.5}, {"own": 0.5, "method": "lora"}, {"hidden": 1.0, "layers": 1}],
    ids=["kept", "own", "own-lora", "layers"],
)
def test_cut_off_and_gone_on_with(tiny_model: Path, cut: Path, tmp_path: Path, distill: dict[str, Any]) -> None:
    (tmp_path / "both").mkdir()
    ends_the_same(tmp_path / "both", lambda folder: taught(folder, tiny_model, cut, **distill), [3, 13])


def test_a_teacher_is_asked_once(tiny_model: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said is found again by a run that goes on, asked anew where something changed, and as good as itself."""
    monkeypatch.setattr(teacher_memory, "PIECE", 500)  # several files
    config = taught(tmp_path, tiny_model, cut, keep=1 << 20, weight=1.0, epochs=4)
    done = train(config)
    files = sorted((tmp_path / "run" / "teacher").glob("*"))
    assert len(files) > 2
    before = [file.stat().st_mtime_ns for file in files]
    train(config)
    files[1].write_bytes(files[1].read_bytes()[:100])  # as a full disk may leave it
    train(config)
    after = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [number != 1 for number in range(len(files))]
    (tmp_path / "live").mkdir()
    live = train(taught(tmp_path / "live", tiny_model, cut, weight=1.0, epochs=4))
    distances = [far(tiny_model, Path(str(folder))) for folder in (cut, done.path, live.path)]
    assert distances[1] < 0.8 * distances[0]
    assert distances[1] == pytest.approx(distances[2], rel=0.02)


def test_own_answers_bring_it_nearer(tiny_model: Path, cut: Path, tmp_path: Path) -> None:
    """By what the teacher holds of the student's own answers alone."""
    done = train(taught(tmp_path, tiny_model, cut, own=1.0, epochs=8))
    assert far(tiny_model, Path(str(done.path))) < 0.9 * far(tiny_model, cut)


@pytest.mark.parametrize(
    ("distill", "reason"),
    [
        ({"keep": -1}, "distill.keep must be at least 0"),
        ({"own": 1.5}, "distill.own must be 0 to 1"),
        ({"layers": 2}, "means nothing without distill.hidden"),
        ({"keep": 4, "own": 0.5}, "distill.own asks the teacher at every pass"),
        ({"keep": 4, "hidden": 1.0}, "distill.hidden asks the teacher at every pass"),
        ({"hidden": 1.0, "layers": 99}, "distill.layers must be below"),
        ({"own": 0.5, "method": "lora", "lora": LoraConfig(dora=True)}, "or lora.dora"),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, distill: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        train(taught(tmp_path, tiny_model, tiny_model, **distill))
