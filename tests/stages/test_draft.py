"""A draft is made by one command, goes on where it was cut off, and guesses without changing a token."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from steelyard.checkpoint import manifest
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import ConfigError, DataError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Request, Sampling
from steelyard.models import weights
from steelyard.models.head_tokens import FILE as TOKENS
from steelyard.stages.compress import quantize
from steelyard.stages.draft import ANSWERS, DraftConfig, draft
from steelyard.train.trainer import Trainer

CONFIG = DraftConfig(blocks=1, head=64, prompts=8, answer=24, epochs=16, learning_rate=3e-3, batch_size=4)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for number in range(8):
            turns = [("user", f"The user asks {number} times."), ("assistant", "Yes.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path


def told(engine: Engine, prompts: list[list[int]]) -> list[str]:
    sampling = Sampling(max_tokens=24, temperature=0)
    texts = [""] * len(prompts)
    for output in engine.run([Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]):
        texts[int(output.id)] += output.text
    return texts


@pytest.mark.parametrize(("teacher", "head", "agreement"), [(0.0, 64, 0.0), (1.0, 0, 0.3)])
def test_a_draft_of_a_domain(
    tiny_model: Path, tmp_path: Path, chats: Path, teacher: float, head: int, agreement: float
) -> None:
    """Random weights say what no tokenizer gives back, so that only a teacher says what comes next."""
    config = msgspec.structs.replace(CONFIG, teacher=teacher, head=head)

    def stop(trainer: Trainer) -> None:
        trainer.stopping = True

    output = tmp_path / "draft"
    cut = draft(tiny_model, chats, output, config, begun=stop)
    assert not cut.finished
    assert not output.exists()
    answers = (tmp_path / "draft-steps" / ANSWERS).read_text()
    done = draft(tiny_model, chats, output, config)
    assert (tmp_path / "draft-steps" / ANSWERS).read_text() == answers, "nobody is asked twice"
    assert done.finished
    assert done.answers == 8
    assert done.agreement > agreement
    written = manifest.verify(output)
    assert written.parent == manifest.read(tiny_model).id
    assert written.recipe["draft"]["blocks"] == 1
    assert weights.load(output).config.layers == 1
    assert (output / TOKENS).exists() == bool(head)
    if head:
        assert len(json.loads((output / TOKENS).read_text())["tokens"]) == head
    quantize(tiny_model, tmp_path / "int8", QuantizeConfig(), accept=True)
    prompts = [[5, 6, 7], list(range(3, 40))]
    plain = Engine.load(tmp_path / "int8", config=EngineConfig(speculate="off"))
    drafted = Engine.load(tmp_path / "int8", draft=output)
    assert told(drafted, prompts) == told(plain, prompts)
    assert drafted.stats().drafted_tokens > 0


def test_texts_are_gone_on_from(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(4)))
    done = draft(tiny_model, path, tmp_path / "draft", DraftConfig(blocks=1, head=0, answer=8, epochs=1))
    assert done.answers == 4
    assert not (tmp_path / "draft" / TOKENS).exists()
    first = json.loads((tmp_path / "draft-steps" / ANSWERS).read_text().splitlines()[0])["text"]
    assert first.startswith("The user asks 0 times.")
    assert len(first) > len("The user asks 0 times.")


def test_what_cannot_be_made(tiny_model: Path, tmp_path: Path, chats: Path) -> None:
    with pytest.raises(ConfigError, match="a draft of 2 blocks: 1 to 1 of the model's 2"):
        draft(tiny_model, chats, tmp_path / "draft", DraftConfig(blocks=2))
    with pytest.raises(ConfigError, match="prompts, answer and epochs are at least 1"):
        draft(tiny_model, chats, tmp_path / "draft", DraftConfig(blocks=1, epochs=0))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        draft(tiny_model, tmp_path / "empty.jsonl", tmp_path / "draft", DraftConfig(blocks=1))
    assert not (tmp_path / "draft").exists()
