"""Classifiers of images, and of text, image and sound together, over HTTP: classes, explanations, hostile files."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from running_service import Service, serving

import drawn
import several_kinds
from steelyard.serve.engine_client import worker_command


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(side: int = 16, grey: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), grey).save(file, "PNG")
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A few bytes that claim to be large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * min(height, 64), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of images and one of three kinds, in folders with names of their own."""
    from steelyard.stages.train import train

    folder = tmp_path_factory.mktemp("examples")
    seer = train(drawn.configuration(folder / "seer", epochs=6))
    joined = train(several_kinds.configuration(folder / "joined", epochs=4))
    places = folder / "images", folder / "several"
    for done, place in zip((seer, joined), places, strict=True):
        Path(str(done.path)).rename(place)
    return places


@pytest.fixture(scope="module")
def seer(trained: tuple[Path, Path]) -> Iterator[Service]:
    with serving(trained[0], command=worker_command, seconds=60) as service:
        yield service


@pytest.fixture(scope="module")
def joined(trained: tuple[Path, Path]) -> Iterator[Service]:
    with serving(trained[1], command=worker_command, seconds=60) as service:
        yield service


def post(service: Service, path: str, **body: Any) -> Any:
    with service.http() as client:
        return client.post(path, json={"model": service.checkpoint.name, **body})


def test_images_are_classified_as_predict_does(seer: Service, tmp_path: Path) -> None:
    from steelyard.data.chat import FormatConfig
    from steelyard.stages.predict import predict

    held = drawn.draw(tmp_path / "held", 6, 5)
    files = sorted(held.rglob("*.png"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": str(file)}) + "\n" for file in files))
    predict(seer.checkpoint, rows, tmp_path / "out.jsonl", FormatConfig())
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    told = post(seer, "/v1/classify", input=[{"image": uri(file.read_bytes())} for file in files])
    assert told.status_code == 200, told.text
    for row, known in zip(told.json()["data"], expected, strict=True):
        assert row["label"] == known["prediction"]
        assert row["probs"] == pytest.approx(list(known["probabilities"].values()), abs=1e-5)
    assert told.json()["usage"]["prompt_tokens"] == 6 * -(-12 * 12 // 64)


def test_an_image_is_explained_by_its_patches(seer: Service) -> None:
    answer = post(seer, "/v1/explain", input={"image": uri(png())})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert {unit["kind"] for unit in told["units"]} == {"image"}
    assert len(told["units"]) == 36  # a seventh of twelve pixels, rounded up: two, so six by six
    shares = sum(unit["share"] for unit in told["units"])
    assert told["value"] == pytest.approx(told["base"] + told["rest"] + told["residual"] + shares, abs=1e-6)
    both = post(seer, "/v1/classify", input={"image": uri(png())}, explain={"method": "occlusion"}).json()
    assert both["data"][0]["explanation"]["target"]["text"] == both["data"][0]["label"]


def test_several_kinds_as_predict_does(joined: Service, tmp_path: Path) -> None:
    from steelyard.data.chat import FormatConfig
    from steelyard.stages.predict import predict

    rows = several_kinds.write_rows(tmp_path / "held", 12, 7)
    predict(joined.checkpoint, rows, tmp_path / "out.jsonl", FormatConfig())
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    given = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        example = {"text": row["text"]}
        if "image" in row:
            example["image"] = uri((rows.parent / row["image"]).read_bytes())
        if "audio" in row:
            example["audio"] = uri((rows.parent / row["audio"]).read_bytes(), "audio/wav")
        given.append(example)
    told = post(joined, "/v1/classify", input=given)
    assert told.status_code == 200, told.text
    for row, known in zip(told.json()["data"], expected, strict=True):
        assert row["probs"] == pytest.approx(list(known["probabilities"].values()), abs=1e-4)
    whole = next(example for example in given if len(example) == 3)
    explained = post(joined, "/v1/explain", input=whole).json()
    assert {unit["kind"] for unit in explained["units"]} == {"text", "image", "audio"}
    text_alone = post(joined, "/v1/classify", input="cold 7").json()
    assert len(text_alone["data"]) == 1


def test_what_is_no_example_is_refused_by_name(seer: Service, joined: Service) -> None:
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(800, np.float32), 8000, format="WAV")
    cases: list[tuple[Service, Any, str, str]] = [
        (seer, "a text", "input", "reads image"),
        (seer, {"text": "x"}, "input.text", "reads image"),
        (seer, {"audio": uri(sound.getvalue(), "audio/wav")}, "input.audio", "reads image"),
        (seer, {"image": "http://example.com/1.png"}, "input.image", "nothing is fetched"),
        (seer, {"image": "data:image/png;base64,@@@"}, "input.image", "no base64"),
        (seer, {"image": uri(b"not an image")}, "input.image", "is no PNG"),
        (seer, [{"image": uri(png())}, {"image": uri(png()[:40])}], "input[1].image", "damaged|is no PNG"),
        (seer, {}, "input", "'text', an 'image' or an 'audio'"),
        (joined, {"audio": uri(b"RIFF0000", "audio/wav")}, "input.audio", "."),
    ]
    for service, given, param, complaint in cases:
        answer = post(service, "/v1/classify", input=given)
        assert answer.status_code == 400, (given, answer.text)
        assert answer.json()["error"]["param"] == param, answer.text
        assert any(part in answer.json()["error"]["message"] for part in complaint.split("|")), answer.text


def test_a_few_bytes_that_claim_to_be_large_are_not_decoded(seer: Service) -> None:
    """A PNG of 169 megapixels: refused by its header, and the server is as it was."""
    before = resident(seer)
    answer = post(seer, "/v1/classify", input={"image": uri(png_that_says(13_000, 13_000))})
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "input.image"
    assert answer.json()["error"]["code"] == "image_too_large"
    assert resident(seer) - before < 50 << 20
    assert post(seer, "/v1/classify", input={"image": uri(png())}).status_code == 200


def resident(service: Service) -> int:
    """Bytes of this process, in which the server runs."""
    import psutil

    return int(psutil.Process().memory_info().rss)
