"""A decoder that begins from nothing, by the stages that users call: text in, a model that goes on with it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interrupted import ends_the_same
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError, DataError
from steelyard.infer.engine import Engine
from steelyard.infer.request import Request, Sampling
from steelyard.models.opening import open_checkpoint
from steelyard.stages.evaluate import Likelihood, evaluate
from steelyard.stages.tasks import language_model, prepared
from steelyard.stages.train import train
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.lora import LoraConfig
from steelyard.train.networks import DecoderNetwork, LstmNetwork
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.trainer import Trainer

SMALL = DecoderNetwork(vocabulary=300, hidden=32, layers=2, heads=2, kv_heads=1, context=64)


def write_text(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            animal = draw.choice(["cat", "dog", "bird"])
            noise = {"cat": "meows", "dog": "barks", "bird": "sings"}[animal]
            file.write(json.dumps({"text": f"The {animal} in house {draw.randrange(1000)} {noise}. Ümlaut ﬁ."}) + "\n")
    return path


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "network": SMALL,
        "output": str(folder / "run"),
        "data": DataConfig(train=str(write_text(folder / "rows.jsonl", 200, 0)), holdout=20),
        "epochs": 6,
        "dtype": "float32",
        "optimizer": OptimizerConfig(name="auto", learning_rate=1e-2),
    }
    return TrainConfig(**{**settings, **fields})


def test_from_nothing_to_a_model_that_goes_on(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, epochs=16))
    path = Path(str(done.path))
    found = evaluate(path, write_text(tmp_path / "held.jsonl", 30, 1), FormatConfig())
    assert isinstance(found, Likelihood)
    assert found.bits_per_byte is not None
    assert found.bits_per_byte < 1.2
    opened = open_checkpoint(path, torch.float32)
    engine = Engine(opened.decoder, opened.tokenizer, {})
    prompt = opened.tokenizer.encode_plain("The cat in house 12")
    request = Request(id="a", prompt=prompt, sampling=Sampling(max_tokens=12, temperature=0))
    said = "".join(output.text for output in engine.run([request]))
    assert "meows" in said
    assert "generation by a new decoder" in Path(done.report).read_text()


def test_every_byte_comes_back(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, epochs=1))
    tokenizer = Tokenizer.load(Path(str(done.path)))
    text = "Ümlaut ﬁ ½ \t\x01 日本 end"
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


def test_rows_in_mapped_files_are_learnt_from_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document is read one after the other; the rows go when the run is finished, and stay while it is not."""

    def learnt(name: str) -> dict[str, torch.Tensor]:
        done = train(configuration(tmp_path, epochs=2, output=str(tmp_path / name)))
        return load_file(Path(str(done.path)) / "model.safetensors")

    expected = learnt("in-memory")
    monkeypatch.setattr(prepared, "LARGE", 0)

    def stop(trainer: Trainer, counts: dict[str, int]) -> None:
        trainer.stopping = True

    train(configuration(tmp_path, epochs=2, output=str(tmp_path / "mapped")), begun=stop)
    kept = tmp_path / "mapped" / "prepared" / "tokens.u32"
    made = kept.stat()
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "tokenized", lambda *how: iter(pytest.fail, None))  # they are not made again
        found = learnt("mapped")
    assert made.st_size > 0
    assert not kept.exists()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_long_text_file_is_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    said = "".join(draw.choice(["The cat meows.", "\n", "\n\n  ", " So it is", "x\n\n"]) for _ in range(2000)).strip()
    path = tmp_path / "long.txt"
    path.write_text(said)
    whole = chat.read(path)
    monkeypatch.setattr(chat, "DOCUMENT", 500)
    pieces = chat.read(path)
    assert len(whole) == 1
    assert 10 < len(pieces) <= len(said) // 500 + 1
    assert "\n".join(piece.messages[0].content for piece in pieces) == said
    lines = said.split("\n")
    assert all(lines[piece.line - 1] == piece.messages[0].content.split("\n")[0] for piece in pieces if piece.line)


@pytest.mark.parametrize("between", ["\n\n", "\n "])
def test_a_long_text_file_is_cut_wherever_its_lines_end(
    between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(between.join(["A line of words."] * 200))
    monkeypatch.setattr(chat, "DOCUMENT", 100)
    pieces = chat.read(path)
    assert max(len(piece.messages[0].content) for piece in pieces) < 250
    assert sum(piece.messages[0].content.count("words") for piece in pieces) == 200


@pytest.mark.parametrize("large", [1 << 30, 0])
def test_an_interrupted_run_ends_the_same(large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LARGE", large)
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=4, epochs=2), (7, 30))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"network": DecoderNetwork(heads=3, kv_heads=2)}, "network.kv_heads 2 must divide network.heads 3"),
        ({"network": DecoderNetwork(hidden=30, heads=4, kv_heads=4)}, "must divide network.hidden"),
        ({"network": LstmNetwork()}, "network.kind lstm is none for task generation: decoder"),
        ({"network": SMALL, "model": "base"}, "name one of them"),
        ({"network": None}, "name one of them"),
        ({"lora": LoraConfig(rank=3)}, "lora means nothing to a network that begins from nothing"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, **fields))


def test_chats_want_a_base(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=r"chat.jsonl:1: a decoder that begins from nothing learns plain text"):
        train(configuration(tmp_path, data=DataConfig(train=str(tmp_path / "chat.jsonl"))))
