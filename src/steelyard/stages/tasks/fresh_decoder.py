"""A decoder that begins from nothing: a tokenizer learnt from the rows, a configuration, weights drawn by the seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from steelyard.data import tokenizer_training
from steelyard.models import config as decoder_config
from steelyard.models.decoder import Decoder
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.networks import DecoderNetwork

ENOUGH = 32 << 20
"""Characters that a tokenizer is learnt from, at most."""
SPREAD = 0.02
"""Standard deviation of fresh weights (Radford et al. 2019)."""


def lay_out(network: DecoderNetwork, texts: Iterable[str], folder: Path) -> None:
    """Write tokenizer and configuration of a Llama of this size into `folder`."""
    folder.mkdir(exist_ok=True)
    tokens = tokenizer_training.train(_some(texts), network.vocabulary, folder / "tokenizer.json", exact=True)
    tokenizer = Tokenizer.load(folder)
    end = tokenizer.token_id(tokenizer_training.END)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens,
        "hidden_size": network.hidden,
        "num_hidden_layers": network.layers,
        "num_attention_heads": network.heads,
        "num_key_value_heads": network.kv_heads,
        "intermediate_size": 32 * math.ceil(network.hidden * 8 / 3 / 32),
        "max_position_embeddings": network.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    _write_json(folder / "config.json", described)
    _write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    _write_json(folder / "tokenizer_config.json", {"eos_token": tokenizer_training.END})


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The first of them: more would change few of a tokenizer's merges."""
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size > ENOUGH:
            return


def begin(folder: Path, seed: int) -> Decoder:
    """The network that `lay_out` described; what adds to the stream is drawn smaller, by how often that is done."""
    decoder = Decoder(decoder_config.load(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                spread = SPREAD / math.sqrt(2 * decoder.config.layers) if adds else SPREAD
                parameter.normal_(0, spread, generator=generator)
    return decoder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
