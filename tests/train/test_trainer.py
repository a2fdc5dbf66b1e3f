"""The training loop: the right gradient however a batch is cut, the best checkpoint, nothing of a broken step."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from families import make
from steelyard.checkpoint import manifest
from steelyard.data.rows import TokenRow
from steelyard.data.token_rows import TokenRows
from steelyard.errors import TrainingError
from steelyard.models import weights
from steelyard.models.decoder import Block, Decoder
from steelyard.runs import Run
from steelyard.train import lora
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.language_model import Evaluator, LanguageModelling
from steelyard.train.lora import LoraConfig
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.schedules import ScheduleConfig
from steelyard.train.trainer import Lineage, Progress, Trainer

CONSTANT = ScheduleConfig(name="constant", warmup=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model; its loss on random tokens is near log 97."""
    folder = tmp_path_factory.mktemp("base")
    make(folder, "smollm")
    return folder


def token_rows(count: int, seed: int = 0, longest: int = 24) -> list[TokenRow]:
    """Rows of random tokens; the loss counts a random part of each, its last token always."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(3, longest)
        trained = [False, *(draw.random() < 0.6 for _ in range(length - 2)), True]
        rows.append(TokenRow(tokens=[draw.randrange(97) for _ in range(length)], trained=trained))
    return rows


def trainer(
    base: Path, folder: Path, rows: list[TokenRow], evaluator: Evaluator | None = None, **fields: Any
) -> Trainer:
    fields = {"method": "full", "dtype": "float32", "schedule": CONSTANT, **fields}
    config = TrainConfig(model=str(base), output=str(folder), data=DataConfig(train="rows.jsonl"), **fields)
    decoder = weights.load(base, getattr(torch, config.dtype))
    adapter = lora.start(decoder, config.lora, config.seed) if config.method == "lora" else None
    run = Run(folder, msgspec.to_builtins(config))
    task = LanguageModelling(decoder, adapter, TokenRows.of(rows), base, evaluator)
    return Trainer(task, config, run, Lineage(parent="base", data={}))


def decoder_of(ours: Trainer) -> Decoder:
    task = ours.task
    assert isinstance(task, LanguageModelling)
    return task.decoder


def mean_loss(reference: torch.nn.Module, rows: list[TokenRow]) -> torch.Tensor:
    """The mean over all trained tokens of all rows, each row alone through transformers."""
    total = torch.zeros(())
    for row in rows:
        logits = reference(torch.tensor([row.tokens])).logits[0]
        where = torch.tensor(row.trained).nonzero().flatten()
        total = total + F.cross_entropy(logits[where - 1], torch.tensor(row.tokens)[where], reduction="sum")
    return total / sum(row.targets for row in rows)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 4096])
def test_the_gradient_is_that_of_the_mean_over_trained_tokens(
    base: Path, tmp_path: Path, micro_batch_tokens: int
) -> None:
    rows = token_rows(9)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loss = mean_loss(reference, rows)
    loss.backward()
    ours = trainer(base, tmp_path, rows, micro_batch_tokens=micro_batch_tokens)
    assert ours.gradient(range(len(rows))) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, expected in reference.named_parameters():
        torch.testing.assert_close(ours.masters[name].grad, expected.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_full_batch_descent_is_the_formula(base: Path, tmp_path: Path) -> None:
    """theta - a grad J(theta), two steps, against transformers and autograd."""
    rows = token_rows(6)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for _ in range(2):
        reference.zero_grad()
        mean_loss(reference, rows).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.05 * parameter.grad
    optimizer = OptimizerConfig(name="gd", learning_rate=0.05)
    ours = trainer(base, tmp_path, rows, optimizer=optimizer, batch_size=0, epochs=2, clip=0.0)
    assert ours.fit()
    for name, expected in reference.named_parameters():
        torch.testing.assert_close(ours.parameters[name], expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [({"method": "full"}, 3e-3), ({"method": "lora"}, 5e-3), ({"method": "lora", "dtype": "bfloat16"}, 5e-3)],
)
def test_it_learns_a_few_rows_by_heart(tiny_model: Path, tmp_path: Path, fields: dict[str, Any], rate: float) -> None:
    seen: list[Progress] = []
    ours = trainer(
        tiny_model,
        tmp_path,
        token_rows(6, longest=12),
        optimizer=OptimizerConfig(learning_rate=rate),
        lora=LoraConfig(rank=16, alpha=16),
        batch_size=3,
        epochs=60,
        checkpoint_every=1000,
        **fields,
    )
    assert ours.fit(seen.append)
    assert [progress.step for progress in seen] == list(range(1, 121))
    assert seen[0].loss > 4
    assert seen[-1].loss < 0.2
    assert seen[-1].epoch == 60
    assert seen[-1].seconds_left == 0


def test_lora_leaves_the_base_alone(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path, token_rows(4), method="lora", epochs=2)
    before = copy.deepcopy(decoder_of(ours).state_dict())
    assert ours.fit()
    after = decoder_of(ours).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()


def test_a_full_run_leaves_the_base_file_alone_and_its_result_opens(base: Path, tmp_path: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    ours = trainer(base, tmp_path, token_rows(4), epochs=2, optimizer=OptimizerConfig(learning_rate=1e-2))
    assert ours.fit()
    assert (base / "model.safetensors").read_bytes() == content
    opened = weights.load(tmp_path / "last", torch.float32)
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, ours.parameters[name]), name


def test_best_is_the_lowest_validation_loss_and_last_the_last(base: Path, tmp_path: Path) -> None:
    found = iter([3.0, 1.0, 2.0, 1.5])
    steps = []

    def evaluator(decoder: object, adapter: object) -> dict[str, float]:
        steps.append(ours.step)
        return {"validation_loss": next(found)}

    ours = trainer(base, tmp_path, token_rows(8), evaluator, method="lora", batch_size=2, epochs=2, evaluate_every=2)
    assert ours.fit()
    assert steps == [2, 4, 6, 8]
    best, last = manifest.verify(tmp_path / "best"), manifest.verify(tmp_path / "last")
    assert best.metrics == {"step": 4, "validation_loss": 1.0}
    assert last.metrics == {"step": 8, "validation_loss": 1.5}
    measured = [point for point in ours.run.metrics() if "validation_loss" in point]
    assert [(point["step"], point["validation_loss"]) for point in measured] == [(2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)]


def test_without_validation_the_last_is_the_best(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path, token_rows(4), method="lora", batch_size=2, epochs=3)
    assert ours.fit()
    best, last = tmp_path / "best" / "adapter_model.safetensors", tmp_path / "last" / "adapter_model.safetensors"
    assert best.read_bytes() == last.read_bytes()


def test_clipping_bounds_the_step_and_the_norm_is_reported_before_it(base: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    optimizer = OptimizerConfig(name="sgd", learning_rate=1.0)
    ours = trainer(base, tmp_path, token_rows(4), optimizer=optimizer, clip=0.01, epochs=1)
    before = {name: master.clone() for name, master in ours.masters.items()}
    ours.fit(seen.append)
    moved = math.sqrt(sum(float((ours.masters[name] - old).square().sum()) for name, old in before.items()))
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert seen[0].gradient_norm > 0.1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(
    base: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(base, tmp_path, token_rows(8), method="lora", batch_size=2, checkpoint_every=1)
    whole = ours.task.loss

    def broken(batch: Any) -> torch.Tensor:
        loss = whole(batch)
        if ours.step < 2:
            return loss
        # A square root at 0 has an infinite slope, and a finite value.
        return loss * math.nan if what == "loss" else loss + (loss - loss.detach()).abs().sqrt()

    monkeypatch.setattr(ours.task, "loss", broken)
    with pytest.raises(TrainingError, match=rf"{what} is (nan|inf) at step 3: lower optimizer.learning_rate"):
        ours.fit()
    assert all(bool(tensor.isfinite().all()) for tensor in ours.parameters.values())
    assert [path.name for path in sorted((tmp_path / "state").iterdir())][-1] == "step-00000002"


def test_no_rows(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no row is left"):
        trainer(base, tmp_path, [])


def test_other_data_do_not_resume_a_run(base: Path, tmp_path: Path) -> None:
    ours = trainer(base, tmp_path, token_rows(4), method="lora", batch_size=2, checkpoint_every=1)
    ours.fit()
    ours.run.close()
    again = trainer(base, tmp_path, token_rows(4), method="lora", batch_size=2, checkpoint_every=1)
    again.lineage = msgspec.structs.replace(again.lineage, data={"rows.jsonl": "other"})
    with pytest.raises(TrainingError, match="the base model or the data changed"):
        again.fit()


def test_the_fused_kernels_give_the_gradient_of_rows_of_any_length(base: Path, tmp_path: Path) -> None:
    """bfloat16, fused, beside float32 by PyTorch alone: what differs are bfloat16's digits."""
    rows = token_rows(12, seed=4, longest=70)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        ours = trainer(base, tmp_path / dtype, rows, dtype=dtype)
        ours.gradient(range(len(rows)))
        gradients.append(
            torch.cat([master.grad.flatten() for master in ours.masters.values() if master.grad is not None])
        )
    exact, rounded = gradients
    assert float((rounded - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(("method", "dtype"), [("full", "bfloat16"), ("lora", "bfloat16"), ("full", "float32")])
def test_blocks_that_are_made_again_change_no_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    """An adapter's dropout falls the same way again."""
    calls = [0]
    forward = Block.forward

    def counted(self: Block, *inputs: Any) -> torch.Tensor:
        calls[0] += 1
        return forward(self, *inputs)

    monkeypatch.setattr(Block, "forward", counted)
    gradients, counts = [], []
    for blocks in (False, True):
        fields: dict[str, Any] = {"method": method, "dtype": dtype, "lora": LoraConfig(rank=4, dropout=0.3)}
        ours = trainer(base, tmp_path / str(blocks), token_rows(8, seed=5, longest=60), **fields)
        ours.task.decoder.recompute_blocks = blocks  # type: ignore[attr-defined]
        ours.task.train(True)
        for name, tensor in ours.parameters.items():
            if "lora_B" in name:
                tensor.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        calls[0] = 0
        ours.gradient(range(8))
        counts.append(calls[0])
        gradients.append([master.grad for master in ours.masters.values() if master.grad is not None])
    assert counts[1] == 2 * counts[0], "each block once more on the way back"
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
