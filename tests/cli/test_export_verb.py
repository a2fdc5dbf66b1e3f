"""`steelyard export` as a user runs it: one file, or one line that says why there is none."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from command import Command

from steelyard.checkpoint import manifest
from steelyard.checkpoint.gguf import GGUF
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.inputs import ImageInputs


def test_gguf(command: Command, tiny_model: Path) -> None:
    found = command("export", "gguf", tiny_model, "--output", "made/x.gguf", "--type", "q4_0", "--json").object
    size = Path("made/x.gguf").stat().st_size
    assert found == {
        "path": "made/x.gguf",
        "checkpoint": manifest.read(tiny_model).id,
        "kind": "q4_0",
        "bytes": size,
        "kept": 0,
    }
    assert GGUF(Path("made/x.gguf")).metadata["general.file_type"] == 2
    done = command("export", "gguf", tiny_model, "-o", "made/x.gguf")
    assert done.code == 0
    assert "q8_0, " in done.out
    assert GGUF(Path("made/x.gguf")).metadata["general.file_type"] == 7
    assert [entry.name for entry in Path("made").iterdir()] == ["x.gguf"]


def classifier(folder: Path) -> None:
    network = ConvNet(ConvNetConfig(image_size=8, num_channels=1, widths=(8,), blocks=1, classes=2))
    folder.mkdir()
    classifiers.save(Classifier(network, ImageInputs(1, 8), ("cat", "dog")), folder)


def test_onnx(command: Command) -> None:
    classifier(Path("pets"))
    done = command("export", "onnx", "pets", "--output", "made/x.onnx", "--json")
    assert done.object == {
        "path": "made/x.onnx",
        "checkpoint": manifest.read(Path("pets")).id,
        "inputs": {"images": ["batch", 1, 8, 8]},
        "output": "logits",
        "labels": ["cat", "dog"],
        "bytes": Path("made/x.onnx").stat().st_size,
        "restored": False,
    }
    done = command("export", "onnx", "pets", "-o", "made/x.onnx")
    assert done.code == 0
    assert "images ['batch', 1, 8, 8] -> logits" in done.out
    assert not done.err.strip()
    assert [entry.name for entry in Path("made").iterdir()] == ["x.onnx"]


def test_onnx_without_its_libraries(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier(Path("pets"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'steelyard[onnx]'" in command("export", "onnx", "pets", "-o", "x.onnx").complaint(2)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["gguf", "MODEL"], 2, "Missing option '--output'"),
        (["gguf", "MODEL", "-o", "x.bin"], 2, "the output 'x.bin' is to be a .gguf file"),
        (["gguf", "MODEL", "-o", "MODEL/model.safetensors"], 2, "end its name in .gguf"),
        (["gguf", "MODEL", "-o", "folder.gguf"], 2, "cannot use 'folder.gguf': Is a directory"),
        (["gguf", "MODEL", "-o", "file/x.gguf"], 2, "cannot use 'file/x.gguf': File exists"),
        (["gguf", "MODEL", "-o", "x.gguf", "--type", "q5_k"], 2, "Invalid value for '--type'"),
        (["gguf", "none", "-o", "x.gguf"], 6, "no checkpoint at 'none'"),
        (["gguf", "folder.gguf", "-o", "x.gguf"], 6, "'folder.gguf' is no checkpoint"),
        (["gguf", "classifier", "-o", "x.gguf"], 2, "'classifier' is a SteelyardConvNet: GGUF is for language models"),
        (["gguf", "words", "-o", "x.gguf"], 6, "splits text by Whitespace in a way that has no name"),
        (["gguf", "mute", "-o", "x.gguf"], 6, "'mute' has no tokenizer.json"),
        (["gguf", "cut", "-o", "x.gguf"], 5, "model.safetensors' is cut short"),
        (["gguf", "empty", "-o", "x.gguf"], 6, "'empty' has no model.safetensors"),
        (
            ["onnx", "MODEL", "-o", "x.onnx"],
            2,
            "LlamaForCausalLM): language models are written by `steelyard export gguf`",
        ),
        (["onnx", "classifier", "-o", "x.gguf"], 2, "is to be a .onnx file"),
        (["onnx", "classifier", "-o", "folder.onnx"], 2, "cannot use 'folder.onnx': Is a directory"),
        (["onnx", "classifier", "-o", "file/x.onnx"], 2, "cannot use 'file/x.onnx': File exists"),
        (["onnx", "none", "-o", "x.onnx"], 6, "no checkpoint at 'none'"),
        (["pickle", "MODEL"], 2, "No such command 'pickle'; see `steelyard export --help`"),
    ],
)
def test_refused(command: Command, tiny_model: Path, arguments: list[str], code: int, complaint: str) -> None:
    Path("file").write_text("precious")
    Path("folder.gguf").mkdir()
    Path("folder.onnx").mkdir()
    classifier(Path("classifier"))
    for name in ("words", "mute", "cut", "empty"):
        shutil.copytree(tiny_model, name)
    tokenizer = Path("words/tokenizer.json")
    start, middle, end = tokenizer.read_text().partition('"pre_tokenizer": {')
    tokenizer.write_text(start + '"pre_tokenizer": {"type": "Whitespace"' + end[end.index("}") :] if middle else "")
    Path("mute/tokenizer.json").unlink()
    whole = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(whole[:1000])
    Path("empty/model.safetensors").unlink()
    weights = (tiny_model / "model.safetensors").read_bytes()
    done = command("export", *(word.replace("MODEL", str(tiny_model)) for word in arguments), "--json")
    assert complaint in done.complaint(code)
    assert Path("file").read_text() == "precious"
    assert not Path("x.gguf").exists()
    assert not Path("x.onnx").exists()
    assert (tiny_model / "model.safetensors").read_bytes() == weights
