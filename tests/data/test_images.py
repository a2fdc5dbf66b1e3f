"""Images: read as they are, bounded, and named when they cannot be; augmented by what torch's generator draws."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steelyard.data import images
from steelyard.data.augmentation import Augmentation
from steelyard.data.chat import FormatConfig
from steelyard.data.image_augmentation import augmented
from steelyard.data.images import ImageRow
from steelyard.errors import DataError

FIELDS = FormatConfig()


def row(path: Path) -> ImageRow:
    return ImageRow(path=path, label="a", file=path.parent / "list.jsonl", line=3)


def test_a_grey_image_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (images.read(row(tmp_path / "a.png"), 1, 9) == pixels).all()
    assert (images.read(row(tmp_path / "a.png"), 3, 9) == pixels).all()


def test_transparent_parts_are_white_and_a_wide_image_is_centred(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    picture.save(tmp_path / "a.png")
    found = images.read(row(tmp_path / "a.png"), 3, 8)
    assert (found[:, :2] == 255).all(), "white above"
    assert (found[:, 6:] == 255).all(), "and below"
    assert (found[:, 2:6, :4] == 255).all(), "transparent"
    assert (found[:, 2:6, 4:] == np.array([255, 0, 0])[:, None, None]).all()


def test_a_camera_that_was_turned(tmp_path: Path) -> None:
    picture = Image.new("L", (6, 6), 255)
    picture.paste(0, (0, 0, 6, 3))  # dark above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    found = images.read(row(tmp_path / "a.png"), 1, 6)[0]
    assert found[:3].min() > 200
    assert found[3:].max() < 50


def png_that_says(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is no PNG"),
        (b"not an image", "is no PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no PNG"),
        (png_that_says(100_000, 100_000), "too many|damaged|is no PNG"),
        (png_that_says(9_000, 9_000), "9000 x 9000 pixels, which are too many"),
        (png_that_says(20, 20), "is damaged"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        images.read(row(path), 1, 8)
    assert "list.jsonl:3: " in str(caught.value)


def test_folders_and_lists_name_the_same(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (4, 4)).save(tmp_path / "photos" / label / f"{number}.PNG")
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no image")
    lines = [{"image": f"photos/{label}/{number}.PNG", "label": label} for label in ("cat", "dog") for number in (0, 1)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "list.tsv").write_text(
        "label\timage\n" + "".join(f"{line['label']}\t{line['image']}\n" for line in lines)
    )
    named = [
        [(found.path, found.label) for found in images.listed(tmp_path / place, FIELDS)]
        for place in ("photos", "list.jsonl", "list.tsv")
    ]
    assert named[0] == named[1] == named[2]
    assert len(named[0]) == 4


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"label": "cat"}, r":1: field 'image': must be the path"),
        ({"image": 3, "label": "cat"}, r":1: field 'image': must be the path"),
        ({"image": "a.png", "label": ["cat"]}, r":1: field 'label': must be a text"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: dict[str, Any], complaint: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=complaint):
        images.listed(tmp_path / "list.jsonl", FIELDS)


def test_no_more_bad_files_than_stated(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        if number % 2:
            path.write_text("broken")
        else:
            Image.new("L", (4, 4), number).save(path)
        rows.append(row(path))
    notes: list[str] = []
    kept, made = images.readable(rows, 3, lambda each: images.read(each, 1, 4)[0, 0, 0], notes.append)
    assert [each.path.name for each in kept] == ["0.png", "2.png", "4.png"]
    assert made == [0, 2, 4]
    assert len(notes) == 3
    assert all("5.png" in note or "3.png" in note or "1.png" in note for note in notes)
    with pytest.raises(DataError, match=r"3 such; mend it, or .* data.bad_files"):
        images.readable(rows, 2, lambda each: images.read(each, 1, 4), notes.append)


def pictures(count: int = 16, side: int = 8) -> torch.Tensor:
    return torch.randint(1, 255, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_nothing_is_changed_by_default() -> None:
    assert torch.equal(augmented(pictures(), Augmentation()), pictures())


def test_half_are_mirrored() -> None:
    torch.manual_seed(0)
    before = pictures(200)
    after = augmented(before, Augmentation(flip=True))
    mirrored = (after == before.flip(-1)).flatten(1).all(1)
    assert ((after == before).flatten(1).all(1) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_each_is_moved_in_its_own_way() -> None:
    torch.manual_seed(0)
    before = pictures(64)
    after = augmented(before, Augmentation(shift=2))
    wide = torch.nn.functional.pad(before.float(), (2,) * 4, mode="replicate").to(torch.uint8)
    moves = set()
    for number in range(64):
        found = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(after[number], wide[number, :, down : down + 8, right : right + 8])
        ]
        assert len(found) == 1
        moves |= set(found)
    assert len(moves) > 15


def test_a_square_is_hidden() -> None:
    torch.manual_seed(0)
    before = pictures(64)
    changed = (augmented(before, Augmentation(erase=4)) != before).any(1)
    assert changed.any((1, 2)).sum() > 30
    for each in changed:
        rows, columns = each.any(1).nonzero().flatten(), each.any(0).nonzero().flatten()
        if len(rows):
            assert rows[-1] - rows[0] < 4
            assert columns[-1] - columns[0] < 4


def test_the_same_draws_give_the_same(tmp_path: Path) -> None:
    config = Augmentation(flip=True, shift=2, erase=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = augmented(pictures(), config)
    torch.set_rng_state(state)
    assert torch.equal(augmented(pictures(), config), first)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 30_069, 65_535]] * 4, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert images.read(row(tmp_path / "a.png"), 1, 4)[0, 0].tolist() == [0, 1, 117, 255]
