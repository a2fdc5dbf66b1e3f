"""What the real tasks learn from: packages' data as rows, parted into what is learnt and what is held."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import corpora
from assets import fetch
from steelyard.atomic import write_file
from steelyard.data.picture import MAX_PIXELS
from steelyard.models.speech import normalised

GENSIM = "gensim==4.4.0"
WORD_PAIRS = {
    "wordsim353.tsv": "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
    "simlex999.txt": "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d",
}
"""Their digests."""

ALIKE = 4
"""Images of one title, at most."""


def fashion_images(folder: Path, most: int | None) -> tuple[Path, Path]:
    """The training and the test images as folders of PNG files, a folder for each kind of clothes."""
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    places = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        place = folder / f"{part}-{most or 'all'}"
        places.append(place)
        if place.is_dir():
            continue
        source = next(fetch("fashion").rglob(f"{prefix}-images-idx3-ubyte*")).parent
        pixels, kinds = (
            np.frombuffer(_content(source, f"{prefix}-{name}-ubyte"), np.uint8, offset=offset)
            for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
        )
        aside = folder / f"aside-{part}"
        for name in names:
            (aside / name).mkdir(parents=True, exist_ok=True)
        for number, image in list(enumerate(pixels.reshape(-1, 28, 28)))[:most]:
            Image.fromarray(image).save(aside / names[kinds[number]] / f"{number:05}.png")
        aside.rename(place)
    return places[0], places[1]


def _content(folder: Path, name: str) -> bytes:
    plain, packed = folder / name, folder / f"{name}.gz"
    return plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())


def brown_sentences(folder: Path, seed: int, most: int | None) -> tuple[Path, Path]:
    """The tagged Brown corpus, nine tenths of its sentences and one, drawn at random.

    Tags are reduced to what stands before their first hyphen, so that titles (`-tl`), headlines (`-hl`) and cited words
    (`-nc`) have their plain tags and foreign words (`fw-nn`) one of their own: 182 of 472 are left.
    """
    paths = folder / f"train-{most or 'all'}.jsonl", folder / f"test-{most or 'all'}.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in sorted((fetch("brown") / "package").glob("c[a-r][0-9][0-9]")):
        for line in file.read_text("latin-1").splitlines():
            pairs = [token.rpartition("/")[::2] for token in line.split()]
            if pairs:
                words, tags = zip(*((word, tag.split("-")[0] or tag) for word, tag in pairs), strict=True)
                rows.append(json.dumps({"tokens": words, "tags": tags}) + "\n")
    order = np.random.default_rng(seed).permutation(len(rows))[:most].tolist()
    tenth = len(order) // 10
    for path, chosen in zip(paths, (order[tenth:], order[:tenth]), strict=True):
        write_file(path, "".join(rows[row] for row in chosen))
    return paths


def spoken_stamps(folder: Path, language: str) -> tuple[Path, Path]:
    """Lists of recordings with their captions: nine tenths of the captions, and one, drawn at random by their texts."""
    paths = folder / "train.jsonl", folder / "test.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    rows: dict[str, list[str]] = {}
    for clip in sorted(fetch("tuxpaint").rglob(f"*_desc_{language}.ogg")):
        captions = clip.with_name(clip.name.replace(f"_desc_{language}.ogg", ".txt"))
        lines = captions.read_text("utf-8", "replace").splitlines() if captions.is_file() else []
        said = [line.partition("=")[2].strip() for line in lines if line.startswith(f"{language}.utf8=")]
        if said and normalised(said[0]):
            row = json.dumps({"audio": str(clip), "text": said[0]}, ensure_ascii=False)
            rows.setdefault(normalised(said[0]), []).append(row + "\n")
    texts = sorted(rows)
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    tenth = len(texts) // 10
    for path, chosen in zip(paths, (order[tenth:], order[:tenth]), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(row for number in chosen for row in rows[texts[number]]))
    return paths


def captioned_images(folder: Path, most: int | None) -> tuple[Path, Path]:
    """Openclipart's images with their titles and categories, a fifth held out; images of one title stay together.

    Words of the categories and of their folders are masked in the titles, since these would say the answer. Of a title
    that many images have (hundreds of icons) some are taken: else what is learnt from and what is held out would be
    unlike.
    """
    paths = folder / f"train-{most or 'all'}.jsonl", folder / f"test-{most or 'all'}.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    root = next(path for path in fetch("openclipart").rglob("png") if path.is_dir())
    named = {word for path in root.rglob("*") if path.is_dir() for word in re.split(r"[^a-z]+", path.name.lower())}
    hidden = {form for word in named if len(word) > 2 for form in (word, word.removesuffix("s"), f"{word}s")}
    titles: dict[str, list[str]] = {}
    for image in sorted(root.rglob("*.png")):
        category = image.relative_to(root).parts[0]
        if image.is_symlink() or category == "unsorted":
            continue
        try:
            with Image.open(image) as opened:
                title = str(opened.info.get("Title") or image.stem.replace("_", " "))
                if opened.width * opened.height > MAX_PIXELS:
                    continue  # some are posters that nothing of ours opens
        except Image.DecompressionBombError:
            continue
        words = [word for word in re.split(r"[^a-z]+", title.lower()) if word]
        masked = " ".join("[MASK]" if word in hidden else word for word in words)
        row = {"text": masked, "image": str(image), "label": category}
        same = titles.setdefault(" ".join(words), [])
        if len(same) < ALIKE:
            same.append(json.dumps(row) + "\n")
    order = np.random.default_rng(0).permutation(len(titles))[:most].tolist()
    groups = list(titles.values())
    fifth = len(order) // 5
    folder.mkdir(parents=True, exist_ok=True)
    for path, chosen in zip(paths, (order[fifth:], order[:fifth]), strict=True):
        write_file(path, "".join(row for number in chosen for row in groups[number]))
    return paths


def plain_texts(folder: Path, quick: bool) -> tuple[Path, Path]:
    """Austen's novels, Brown's words and chats in pieces of some 2,000 characters; a twentieth of them held out."""
    size = 100 if quick else None
    paths = folder / f"train-{size or 'all'}.jsonl", folder / f"test-{size or 'all'}.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    documents = [*corpora.austen(), *corpora.brown(), *corpora.chats()]
    order = np.random.default_rng(0).permutation(len(documents))[:size].tolist()
    rows = [json.dumps({"text": documents[number]}, ensure_ascii=False) + "\n" for number in order]
    held = len(rows) // 20
    for path, chosen in zip(paths, (rows[held:], rows[:held]), strict=True):
        write_file(path, "".join(chosen))
    return paths


def word_pairs(folder: Path, name: str) -> list[tuple[str, str, float]]:
    """Pairs of words with what people think of their likeness, from the package that carries them.

    Its wheel is another one on every platform.
    """
    if not list(folder.glob("gensim-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", GENSIM, "-d", str(folder)]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("gensim-*.whl"))) as wheel:
        content = wheel.read(f"gensim/test/test_data/{name}")
    assert hashlib.sha256(content).hexdigest() == WORD_PAIRS[name], "another file than was measured on"
    lines = [line.split("\t") for line in content.decode().splitlines() if not line.startswith("#")]
    return [
        (line[0], line[1], float(line[2])) for line in lines if len(line) == 3 and line[2].replace(".", "").isdigit()
    ]
