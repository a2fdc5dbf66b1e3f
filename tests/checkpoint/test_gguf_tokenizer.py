from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import BOOL, F32, I32, STRING, U32, GGUFSpec, array, bpe_pairs, model_pairs, pair, text
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from steelyard.errors import ArtifactError

CORPUS = [
    "Weigh 12345 items, 3.14 each: I'll say it's 100% exact.",
    "def f(x):\n    return x ** 2\n\n\n\tif x:   pass  ",
    "日本語のテキスト, 今天天气很好, Привет!",
    "emoji 😀🚀👩‍👩‍👧 café naïve Ⅷ ½ ²",
    "  leading, trailing  \n",
    "",
]


def build(pairs: list[bytes], folder: Path, vocabulary: int = 100_000) -> Tokenizer:
    GGUFSpec(pairs).write(folder / "x.gguf")
    write_tokenizer(GGUF(folder / "x.gguf"), folder, vocabulary, 128)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def without(pairs: list[bytes], *keys: str) -> list[bytes]:
    return [raw for raw in pairs if not raw.startswith(tuple(text(f"tokenizer.{key}") for key in keys))]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_comes_back(tmp_path: Path, pre: str) -> None:
    tokenizer = build(bpe_pairs(pre), tmp_path)
    for sample in CORPUS:
        assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False).ids) == sample


@given(sample=st.text())
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, sample: str) -> None:
    tokenizer = build(bpe_pairs(), tmp_path_factory.mktemp("any"))
    assert tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) == sample


def test_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = build(bpe_pairs(), tmp_path)
    assert tokenizer.encode("hell the").tokens == ["he", "ll", "Ġt", "he"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids[:1] == [1]
    assert tokenizer.decode([1, 259, 2]) == "he"
    assert tokenizer.decode([1, 259, 2], skip_special_tokens=False) == "<|im_start|>he<|im_end|>"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert settings["add_bos_token"] is False
    assert (tmp_path / "chat_template.jinja").read_text().startswith("{% for m in messages %}")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["a", "  ", "1", "2", "3", "4", " b", "'ll"]),
        ("gpt-2", ["a", " ", " 1234", " b", "'ll"]),
        ("qwen2", ["a", " ", " ", "1", "2", "3", "4", " b", "'ll"]),
        ("llama-bpe", ["a", " ", " ", "123", "4", " b", "'ll"]),
    ],
)
def test_text_is_split_as_the_name_says(pre: str, pieces: list[str]) -> None:
    split = [piece.replace("Ġ", " ") for piece, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str("a  1234 b'll")]
    assert split == pieces


def test_llama3_adds_its_first_token_and_takes_whole_words(tmp_path: Path) -> None:
    pairs = bpe_pairs("llama-bpe", ["h e", "l l", "he llo"])
    with pytest.raises(ArtifactError, match="merges that do not fit"):
        build(pairs, tmp_path)
    tokenizer = build(bpe_pairs("llama-bpe"), tmp_path)
    assert tokenizer.encode("he").ids == [1, 259]
    assert tokenizer.encode("he", "he").ids == [1, 259, 1, 259]
    assert tokenizer.encode("he", add_special_tokens=False).ids == [259]


def test_flags_decide_about_first_and_last_token(tmp_path: Path) -> None:
    flags = [pair("tokenizer.ggml.add_bos_token", BOOL, True), pair("tokenizer.ggml.add_eos_token", BOOL, True)]
    assert build([*bpe_pairs(), *flags], tmp_path).encode("he").ids == [1, 259, 2]


def test_user_defined_tokens_are_kept_in_text(tmp_path: Path) -> None:
    pairs = without(bpe_pairs(), "ggml.token_type")
    types = [3, 3, 3] + [1] * 256 + [1, 1, 4]
    tokenizer = build([*pairs, array("tokenizer.ggml.token_type", I32, types)], tmp_path)
    assert tokenizer.decode(tokenizer.encode("xĠty").ids) == "x ty"
    assert 261 in tokenizer.encode("xĠty").ids


def test_qwen_without_a_name_of_its_split(tmp_path: Path) -> None:
    tokenizer = build([*model_pairs("qwen2"), *bpe_pairs(None)], tmp_path)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids  # NFC


REFUSED = {
    "other split": (bpe_pairs("deepseek-llm"), "'deepseek-llm'.*known are smollm"),
    "unnamed split": (bpe_pairs(None), "pre-tokenizer 'None'"),
    "no tokens": (without(bpe_pairs(), "ggml.tokens"), "'tokenizer.ggml.tokens'"),
    "no types": (without(bpe_pairs(), "ggml.token_type"), "'tokenizer.ggml.token_type'"),
    "no merges": (without(bpe_pairs(), "ggml.merges"), "'tokenizer.ggml.merges'"),
    "short types": (
        [*without(bpe_pairs(), "ggml.token_type"), array("tokenizer.ggml.token_type", I32, [1, 1])],
        "number for each token",
    ),
    "twice": (bpe_pairs("smollm", ["h e", "h e"]), "lists a token twice"),
    "merge without a space": (
        [*without(bpe_pairs(), "ggml.merges"), array("tokenizer.ggml.merges", STRING, ["he", ""])],
        "merges that do not fit",
    ),
    "first token without an id": (
        [*without(bpe_pairs("llama-bpe"), "ggml.bos_token_id")],
        "adds a bos token",
    ),
    "id outside": (
        [*without(bpe_pairs(), "ggml.eos_token_id"), pair("tokenizer.ggml.eos_token_id", U32, 1 << 20)],
        "eos_token_id' that is no token",
    ),
    "template": (
        [*without(bpe_pairs(), "chat_template"), pair("tokenizer.chat_template", STRING, "x" * (2 << 20))],
        "chat template",
    ),
    "unigram": ([*without(bpe_pairs(), "ggml.model"), pair("tokenizer.ggml.model", STRING, "t5")], "kind 't5'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    pairs, message = REFUSED[case]
    with pytest.raises(ArtifactError, match=message) as caught:
        build(pairs, tmp_path)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_the_embedding_has(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="262 tokens for an embedding of 261"):
        build(bpe_pairs(), tmp_path, 261)


def test_byte_level_equals_the_tokenizer_that_it_was_written_from(tmp_path: Path) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    )
    state = json.loads(trained.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    pairs = [
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.pre", STRING, "gpt-2"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, [1] * len(tokens)),
        array("tokenizer.ggml.merges", STRING, [" ".join(merge) for merge in state["merges"]]),
    ]
    rebuilt = build(pairs, tmp_path)
    for sample in CORPUS:
        assert rebuilt.encode(sample).ids == trained.encode(sample).ids


def test_sentencepiece_equals_sentencepiece(tmp_path: Path) -> None:
    """A real BPE model, trained by the sentencepiece library, against what is rebuilt from its pieces and scores."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = "the steelyard weighs exactly with one moving weight and the weights move".split()  # noqa: SIM905
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(words, 8)) for _ in range(400)] + [
        sample.replace("\n", " ") for sample in CORPUS if sample
    ]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    size = reference.get_piece_size()
    types = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in range(size)
    ]
    pairs = [
        pair("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, [reference.id_to_piece(i) for i in range(size)]),
        array("tokenizer.ggml.scores", F32, [reference.get_score(i) for i in range(size)]),
        array("tokenizer.ggml.token_type", I32, types),
        pair("tokenizer.ggml.bos_token_id", U32, 1),
        pair("tokenizer.ggml.eos_token_id", U32, 2),
        pair("tokenizer.ggml.unknown_token_id", U32, 0),
    ]
    tokenizer = build(pairs, tmp_path)
    for sample in [*sentences[:100], "unseen: ﷽ 龘 \n\t zzz", *(sample for sample in CORPUS if sample)]:
        assert tokenizer.encode(sample).ids == [1, *reference.encode(sample)], sample
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
