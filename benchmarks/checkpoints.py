"""What the benchmarks of the engine run: SmolLM2 in int8, a tiny model of random weights, and adapters for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize import layout
from steelyard.demo.lifecycle import MODEL
from steelyard.models import config, weights
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M in int8, as `folder/smollm2`."""
    base, made = pull(MODEL, cache=default_cache()), folder / "smollm2"
    made.mkdir()
    layout.write(weights.load(base), made, base)
    return made


def tiny(folder: Path) -> Path:
    """A Llama of two layers with random weights in int8 and a tokenizer of bytes, as `folder/tiny`."""
    base, dense, made = folder / "tiny-base", folder / "tiny-dense", folder / "tiny"
    for place in (base, dense, made):
        place.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(base / "tokenizer.json"))
    for name, content in {"config": TINY, "tokenizer_config": {"eos_token": "<|im_end|>"}}.items():
        (base / f"{name}.json").write_text(json.dumps(content))
    decoder = Decoder(config.parse(TINY))
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():  # large enough for answers to differ from prompt to prompt
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    weights.save(decoder, dense, base)
    layout.write(weights.load(dense, torch.float32), made, dense)
    return made


def adapters(checkpoint: Path, folder: Path, ranks: Sequence[int], size: float) -> list[Path]:
    """An adapter of each rank, of all layers or of some, in `folder`.

    Args:
        checkpoint: the base.
        folder: where.
        ranks: of them.
        size: standard deviation of B: large enough for answers to differ.
    """
    decoder = weights.load(checkpoint)
    made = []
    for number, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(number)
        targets = TARGETS if number % 2 else ("q_proj", "v_proj", "up_proj")
        adapter = Adapter.create(decoder, rank=rank, alpha=rank, targets=targets, generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, size, generator=generator)
        path = folder / f"{checkpoint.name}-adapter-{number}"
        path.mkdir()
        adapter.save(path, str(checkpoint))
        made.append(path)
    return made
