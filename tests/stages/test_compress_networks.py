"""Networks that are no decoders, quantised and pruned: smaller, nearly the same answers, opened by every stage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_transcriber import write_clips
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from steelyard.checkpoint import manifest
from steelyard.cli.compress import app
from steelyard.compress.inputs import linears
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, DataError, FidelityError
from steelyard.evaluate.answers import AnswersCertificate, certify
from steelyard.models import classifiers, seq2seq, speech
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.linear import QuantizedLinear
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.models.seq2seq import Whisper, WhisperConfig
from steelyard.models.speech import Recogniser, SpeechCTC
from steelyard.models.vision import VisionConfig, VisionTransformer
from steelyard.stages.compress import prune, quantize
from steelyard.stages.compress_networks import opened
from steelyard.stages.predict import predict
from steelyard.train.config import DataConfig, TrainConfig

LABELS = ("cat", "dog", "cow")
KINDS = ["lstm", "classifier", "tagger", "conv", "vit", "encoder", "recogniser", "whisper"]
SPOKEN = ("recogniser", "whisper")
Made = Callable[[str], tuple[Path, Path]]


SPEAKING: dict[str, Any] = {"encoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SPEAKING |= {"decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32}


def write_recogniser(folder: Path, tokenizer: Path) -> None:
    network = SpeechCTC(WhisperConfig(vocab_size=4, **SPEAKING), 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    folder.mkdir()
    speech.save(Recogniser(network, ("a", "b", "c")), folder)


def write_whisper(folder: Path, tokenizer: Path) -> None:
    """Its answers are short: one token of its few is the end."""
    config = WhisperConfig(vocab_size=100, max_target_positions=24, **SPEAKING)
    network = Whisper(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    shutil.copytree(tokenizer, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    described = {"architectures": [seq2seq.ARCHITECTURE], **msgspec.to_builtins(config)}
    (folder / "config.json").write_text(json.dumps(described))
    said = {"eos_token_id": 0, "decoder_start_token_id": 1, "no_timestamps_token_id": 99}
    (folder / "generation_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Made:
    """A checkpoint of random weights and a file of rows for it."""
    folder, draw = tmp_path_factory.mktemp("networks"), random.Random(0)
    torch.manual_seed(0)
    words = ["meow", "bark", "moo", "tail", "milk", "bone"]
    sentences = [[draw.choice(words) for _ in range(draw.randint(2, 12))] for _ in range(60)]
    bert = folder / "encoder"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=512, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, **sizes
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(bert)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, bert / name)
    rows = {
        "texts": [{"text": " ".join(sentence), "label": draw.choice(LABELS)} for sentence in sentences],
        "tagged": [{"tokens": sentence, "tags": ["cat"] * len(sentence)} for sentence in sentences],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(30):
        (folder / "images" / LABELS[number % 3]).mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise((12, 12), 40 + 2 * number)
        picture.save(folder / "images" / LABELS[number % 3] / f"{number}.png")

    def network(kind: str) -> tuple[Path, Path]:
        place = folder / kind
        data = {"tagger": "tagged.jsonl", "conv": "images", "vit": "images"}.get(kind, "texts.jsonl")
        data = "clips/list.jsonl" if kind in SPOKEN else data
        if place.is_dir():
            return place, folder / data
        torch.manual_seed(0)  # the same network whichever is made first
        if kind in SPOKEN:
            write_clips(folder / "clips", 12, 0)
            (write_recogniser if kind == "recogniser" else write_whisper)(place, tiny_tokenizer_folder)
            return place, folder / data
        made: torch.nn.Module
        if kind in ("classifier", "tagger"):
            known = classifiers.EncoderClassifier if kind == "classifier" else classifiers.EncoderTagger
            made = classifiers.on_encoder(bert, LABELS, torch.Generator().manual_seed(1), known).network
        elif kind == "lstm":
            sizes = {"embedding_size": 16, "hidden_size": 32, "dense_size": 16}
            made = RecurrentClassifier(RecurrentConfig(vocab_size=512, classes=3, **sizes))
        elif kind == "conv":
            made = ConvNet(ConvNetConfig(image_size=12, num_channels=1, widths=(16, 32), blocks=1, classes=3))
        else:
            sized = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            raw = {"image_size": 12, "num_channels": 1, "patch_size": 4, **sized}
            made = VisionTransformer(VisionConfig.parse(raw, 3))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        place.mkdir()
        origin = None if kind in ("conv", "vit") else bert
        inputs = classifiers.inputs_of(made, bert)  # type: ignore[arg-type]
        classifiers.save(Classifier(made, inputs, LABELS, origin), place)  # type: ignore[arg-type]
        return place, folder / data

    return network


def parameters(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(),
        QuantizeConfig(group=16),
        QuantizeConfig(bits=4, group="auto", method="gptq"),
        QuantizeConfig(bits=4, group=16, int8_layers=("*",)),
    ],
    ids=["int8", "int8-groups", "int4-gptq", "int8-of-int4"],
)
def test_quantised(made: Made, tmp_path: Path, kind: str, config: QuantizeConfig) -> None:
    source, data = made(kind)
    told: list[tuple[int, int]] = []
    found = quantize(
        source, tmp_path / "small", config, data=data, accept=True, report=lambda done, of: told.append((done, of))
    )
    assert isinstance(found, AnswersCertificate)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.agreement > (0.9 if config.bits == 8 or config.int8_layers else 0.5), found
    assert found.bytes_after < (0.75 if kind in ("conv", "lstm", "vit", *SPOKEN) else 0.55) * found.bytes_before
    written = manifest.verify(tmp_path / "small")
    assert written.parent == manifest.read(source).id
    assert written.recipe["compress"]["bits"] == config.bits
    assert written.certificate == msgspec.to_builtins(found)
    if kind != "encoder":
        count = predict(tmp_path / "small", data, tmp_path / "out.jsonl", FormatConfig())
        assert count == {"conv": 30, "vit": 30, "recogniser": 12, "whisper": 12}.get(kind, 60)
    layers = [layer for layer in opened(tmp_path / "small").modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == len(linears(opened(source)))
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(tmp_path / "small", tmp_path / "smaller", config, data=data, accept=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruned(made: Made, tmp_path: Path, kind: str, method: Any) -> None:
    source, data = made(kind)
    config = PruneConfig(method=method, pattern="2:4")
    given = None if method == "magnitude" and kind in ("lstm", "classifier", "encoder") else data
    if kind == "conv":
        with pytest.raises(CheckpointError, match="no linear layers but its last"):
            prune(source, tmp_path / "small", config, data=given, accept=True)
        assert not (tmp_path / "small").exists()
        return
    found = prune(source, tmp_path / "small", config, data=given, accept=True)
    assert isinstance(found, AnswersCertificate)
    for name, layer in linears(opened(tmp_path / "small")).items():
        if not name.endswith("classifier"):
            assert ((layer.weight.view(-1, 4) == 0).sum(1) >= 2).all(), name


def test_without_rows(made: Made, tmp_path: Path) -> None:
    """Texts that ship with the package stand in, where the network reads texts."""
    for kind in ("lstm", "classifier", "encoder"):
        found = quantize(made(kind)[0], tmp_path / kind, accept=True)
        assert isinstance(found, AnswersCertificate)
        assert found.rows == 32
    for kind in ("tagger", "conv", "vit", *SPOKEN):
        with pytest.raises(DataError, match=r"reads no plain texts: give it rows|reads recordings: give it some"):
            quantize(made(kind)[0], tmp_path / kind)


def test_what_does_not_go(made: Made, tmp_path: Path) -> None:
    source, data = made("classifier")
    for config, complaint in (
        (QuantizeConfig(method="awq"), "awq is for decoders"),
        (QuantizeConfig(portable=True), "portable is for decoders"),
        (QuantizeConfig(group=48), "group 48 does not divide the 32 inputs of"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            quantize(source, tmp_path / "small", config, data=data)
    with pytest.raises(ConfigError, match="tokens are a decoder's"):
        quantize(source, tmp_path / "small", QuantizeConfig(), data=data, tokens=100)
    with pytest.raises(ConfigError, match="tokens are a decoder's"):
        prune(source, tmp_path / "small", PruneConfig(), data=data, tokens=100)
    assert not (tmp_path / "small").exists()


def test_bounds_of_another_kind_are_refused(made: Made, tiny_model: Path, tmp_path: Path) -> None:
    source, _ = made("classifier")
    for model, option, complaint in (
        (source, ("--max-kl", "0.1"), "here it is --min-agreement"),
        (tiny_model, ("--min-agreement", "0.9"), "here it is --max-bits-per-byte"),
    ):
        found = CliRunner().invoke(app, ["quantize", str(model), "-o", str(tmp_path / "small"), *option])
        assert isinstance(found.exception, ConfigError)
        assert complaint in str(found.exception)
    assert not (tmp_path / "small").exists()


def test_a_network_of_integers_is_not_trained_on(made: Made, tmp_path: Path) -> None:
    from steelyard.stages.train import train

    source, data = made("classifier")
    quantize(source, tmp_path / "small", data=data, accept=True)
    config = TrainConfig(
        task="classification",
        model=str(tmp_path / "small"),
        output=str(tmp_path / "run"),
        data=DataConfig(train=str(data), holdout=10, deduplicate=False),
    )
    with pytest.raises(CheckpointError, match="is quantised: train on the model that it was made from"):
        train(config)


def test_a_certificate_can_refuse(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = made("classifier")
    whole = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: -whole(self, x))
    with pytest.raises(FidelityError, match="past its threshold"):
        quantize(source, tmp_path / "small", data=data)
    assert not (tmp_path / "small").exists()
    assert quantize(source, tmp_path / "small", data=data, accept=True).accepted


def test_its_figures() -> None:
    before = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    after = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.4, 0.6]]).log()
    found = certify(before, after, vectors=False, parent="p", sizes=(10, 5))
    each = torch.nn.functional.kl_div(after.double(), before.double(), log_target=True, reduction="none").sum(1)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.divergence == pytest.approx(float(each.mean()))
    assert found.divergence_max == pytest.approx(float(each.max()))
    assert not found.passed
    never = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]).log()  # as taggers have what cannot follow
    assert certify(never, never, vectors=False, parent="p", sizes=(10, 5)).divergence == 0
    vectors = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    same = certify(vectors, vectors, vectors=True, parent="p", sizes=(10, 5))
    assert same.passed
    assert same.agreement == pytest.approx(1)
    broken = certify(vectors, vectors * float("nan"), vectors=True, parent="p", sizes=(10, 5))
    assert not broken.passed
