"""onnxruntime says of rows of any number and length what the network says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx as reference
import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertModel

from steelyard.checkpoint import manifest
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.inputs import Sentence
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.models.vision import VisionConfig, VisionTransformer
from steelyard.stages.compress import quantize
from steelyard.stages.export_onnx import onnx

LABELS = ("cat", "dög", "cow")
KINDS = ["encoder", "classifier", "lstm", "conv", "vit", "tagger"]
CONTEXT, TOKENS = 64, 512
SHAPES = ((1, 1), (1, 9), (2, 1), (7, 33), (17, CONTEXT))
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Made:
    """A checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    bert = folder / "encoder"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=TOKENS, num_attention_heads=2, max_position_embeddings=CONTEXT, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(bert)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, bert / name)

    def network(kind: str) -> Path:
        if (folder / kind).is_dir():
            return folder / kind
        made: torch.nn.Module
        if kind in ("classifier", "tagger"):
            known = classifiers.EncoderClassifier if kind == "classifier" else classifiers.EncoderTagger
            made = classifiers.on_encoder(bert, LABELS, torch.Generator().manual_seed(1), known).network
        elif kind == "lstm":
            made = RecurrentClassifier(RecurrentConfig(vocab_size=TOKENS, embedding_size=16, hidden_size=32, classes=3))
        elif kind == "conv":
            made = ConvNet(ConvNetConfig(image_size=12, num_channels=3, widths=(16, 24), blocks=1, classes=3))
        else:
            raw = {"image_size": 12, "num_channels": 3, "patch_size": 4, "num_attention_heads": 2, **sizes}
            made = VisionTransformer(VisionConfig.parse(raw, 3))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        (folder / kind).mkdir()
        inputs: Any = classifiers.inputs_of(made, bert)  # type: ignore[arg-type]
        origin = None if kind in ("conv", "vit") else bert
        classifiers.save(Classifier(made, inputs, LABELS, origin), folder / kind)  # type: ignore[arg-type]
        return folder / kind

    return network


def examples(kind: str, rows: int, length: int) -> list[Any]:
    if kind in ("conv", "vit"):
        return list(torch.randint(0, 256, (rows, 3, 12, 12), dtype=torch.uint8))
    lengths = [length, *torch.randint(1, length + 1, (rows - 1,)).tolist()]
    texts = [torch.randint(0, TOKENS, (length,)).tolist() for length in lengths]
    if kind != "tagger":
        return texts
    return [Sentence(text, list(range(0, len(text), 2)), [at % 8 for at in range(len(text))]) for text in texts]


def asked(folder: Path, kind: str, given: list[Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The graph's arguments for some examples, and what the network says of them."""
    with torch.inference_mode():
        if kind == "encoder":
            arguments = classifiers.TextInputs(None, CONTEXT).batch(given)  # type: ignore[arg-type]
            said = classifiers.load_encoder(folder).embed(*arguments)
        else:
            classifier = classifiers.load(folder)
            arguments = classifier.inputs.batch(given)
            said = classifier.network(*arguments)
    if kind in ("conv", "vit"):
        return {"images": arguments[0].numpy()}, said.float().numpy()
    token_ids, lengths, *others = arguments
    mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
    found = {"input_ids": token_ids, "attention_mask": mask.long()}
    found |= dict(zip(("word_shapes", "word_places"), others, strict=False))
    return {name: tensor.numpy() for name, tensor in found.items()}, said.float().numpy()


def run(file: Path, arguments: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(file).run(None, arguments)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_says_what_the_network_says(made: Made, tmp_path: Path, kind: str) -> None:
    source = made(kind)
    found = onnx(source, tmp_path / "x.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.onnx"]
    assert found.output == ("sentence_embedding" if kind == "encoder" else "logits")
    assert found.labels == (() if kind == "encoder" else LABELS)
    assert not found.restored
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert {one.name: tuple(one.shape) for one in session.get_inputs()} == found.inputs
    assert [one.name for one in session.get_outputs()] == [found.output]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["steelyard.checkpoint"] == manifest.read(source).id == found.checkpoint
    assert json.loads(metadata.get("steelyard.labels", "[]")) == list(found.labels)
    assert metadata.get("steelyard.context") == (str(CONTEXT) if kind in ("encoder", "classifier", "tagger") else None)
    torch.manual_seed(2)
    for rows, length in SHAPES:
        arguments, said = asked(source, kind, examples(kind, rows, length))
        assert arguments.keys() == found.inputs.keys()
        (told,) = session.run(None, arguments)
        np.testing.assert_allclose(told, said, rtol=1e-4, atol=2e-5)


def test_the_file_is_whole_and_tells_nothing_of_this_machine(made: Made, tmp_path: Path) -> None:
    onnx(made("classifier"), tmp_path / "x.onnx")
    model = reference.load(tmp_path / "x.onnx")
    reference.checker.check_model(model, full_check=True)
    raw = (tmp_path / "x.onnx").read_bytes()
    for word in (b".py", b"/home", str(Path.cwd()).encode(), str(tmp_path).encode()):
        assert word not in raw, word


def test_rows_without_tokens_are_read_as_padding(made: Made, tmp_path: Path) -> None:
    source = made("classifier")
    onnx(source, tmp_path / "x.onnx")
    arguments, _ = asked(source, "classifier", [[0], [5, 6, 7]])
    first = run(tmp_path / "x.onnx", arguments)
    arguments["attention_mask"][0] = 0
    np.testing.assert_allclose(run(tmp_path / "x.onnx", arguments), first, rtol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "lstm", "vit"])
def test_integers_become_numbers(made: Made, tmp_path: Path, kind: str) -> None:
    source = made(kind)
    rows = tmp_path / "rows"
    if kind == "vit":
        from PIL import Image

        for number, label in enumerate(LABELS * 2):
            (rows / label).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((12, 12), 50).convert("RGB").save(rows / label / f"{number}.png")
    quantize(source, tmp_path / "small", QuantizeConfig(), data=rows if kind == "vit" else None, accept=True)
    found = onnx(tmp_path / "small", tmp_path / "x.onnx")
    assert found.restored
    assert found.checkpoint == manifest.read(tmp_path / "small").id
    torch.manual_seed(3)
    arguments, said = asked(tmp_path / "small", kind, examples(kind, 5, 20))
    _, before = asked(source, kind, examples(kind, 5, 20))
    told = run(tmp_path / "x.onnx", arguments)
    assert 0 < np.abs(told - said).max() < 0.05 * np.abs(before).max()


def test_bfloat16_is_written_as_float32(made: Made, tmp_path: Path) -> None:
    opened = classifiers.load(made("classifier"))
    opened.network.to(torch.bfloat16)
    (tmp_path / "half").mkdir()
    classifiers.save(opened, tmp_path / "half")
    onnx(tmp_path / "half", tmp_path / "x.onnx")
    arguments, said = asked(tmp_path / "half", "classifier", examples("classifier", 4, 12))
    told = run(tmp_path / "x.onnx", arguments)
    assert told.dtype == np.float32
    assert np.abs(told - said).max() < 0.05 * np.abs(said).max()


def test_another_model_or_name_is_refused(made: Made, tiny_model: Path, tmp_path: Path) -> None:
    source = made("conv")
    with pytest.raises(ConfigError, match=r"end its name in \.onnx"):
        onnx(source, tmp_path / "x.bin")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*`steelyard export gguf`"):
        onnx(tiny_model, tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        onnx(tmp_path / "none", tmp_path / "x.onnx")
    shutil.copytree(source, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        onnx(tmp_path / "cut", tmp_path / "x.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut"]
