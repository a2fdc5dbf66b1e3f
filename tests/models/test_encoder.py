"""The encoder against transformers' on the same weights; its embeddings; a classifier on it, saved and opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from steelyard.errors import CheckpointError
from steelyard.models import classifiers
from steelyard.models.encoder import EncoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> tuple[BertModel, Path]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    model.float().eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    return model, folder


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(211, (5, 17), generator=generator), torch.tensor([17, 3, 1, 12, 8])


def test_hidden_states_are_transformers(reference: tuple[BertModel, Path]) -> None:
    model, folder = reference
    token_ids, lengths = batch()
    mask = torch.arange(17) < lengths[:, None]
    with torch.no_grad():
        expected = model(token_ids, attention_mask=mask.long()).last_hidden_state
        found = classifiers.load_encoder(folder)(token_ids, lengths)
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=1e-4)


def test_an_embedding_depends_on_no_neighbour_and_no_padding(reference: tuple[BertModel, Path]) -> None:
    encoder = classifiers.load_encoder(reference[1])
    token_ids, lengths = batch()
    together = encoder.embed(token_ids, lengths)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.embed(token_ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_classifier_is_saved_and_opened(reference: tuple[BertModel, Path], tmp_path: Path) -> None:
    made = classifiers.on_encoder(reference[1], ["ham", "späm"], torch.Generator().manual_seed(0))
    made.network.eval()
    classifiers.save(made, tmp_path)
    assert classifiers.is_classifier(tmp_path)
    again = classifiers.load(tmp_path)
    assert again.labels == ("ham", "späm")
    rows = [[1, 2, 3], [4], list(range(30))]
    torch.testing.assert_close(classifiers.log_probabilities(again, rows), classifiers.log_probabilities(made, rows))
    assert len(again.text.tokens("word " * 500)) == 40, "no more than its context"


def broken(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config, tensors: config.update(hidden_act="relu"), "gelu"),
        (lambda config, tensors: config.update(position_embedding_type="relative_key"), "absolute"),
        (lambda config, tensors: config.update(num_attention_heads=5), "heads must divide"),
        (lambda config, tensors: config.update(vocab_size="many"), "vocab_size"),
        (lambda config, tensors: config.pop("hidden_size"), "hidden_size"),
        (lambda config, tensors: config.update(id2label={"0": "a"}), "at least two classes"),
        (lambda config, tensors: config.update(id2label={"0": "a", "2": "b"}), "from 0 on"),
        (lambda config, tensors: tensors.pop("classifier.bias"), "lacks 'classifier.bias'"),
        (lambda config, tensors: tensors.update(other=torch.zeros(1)), "unknown 'other'"),
        (lambda config, tensors: tensors.update({"classifier.bias": torch.zeros(3)}), r"is \(3,\), config.json says"),
    ],
)
def test_what_does_not_fit_is_named(
    reference: tuple[BertModel, Path], tmp_path: Path, change: Any, complaint: str
) -> None:
    classifiers.save(classifiers.on_encoder(reference[1], ["a", "b"], torch.Generator()), tmp_path)
    broken(tmp_path, change)
    with pytest.raises(CheckpointError, match=complaint):
        classifiers.load(tmp_path)


def test_no_encoder(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="no encoder that is known here"):
        classifiers.load_encoder(tiny_model)
    with pytest.raises(CheckpointError, match="is no classifier"):
        classifiers.load(_with_labels(tiny_model))


def _with_labels(folder: Path) -> Path:
    target = folder.parent / "labelled"
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    return target


def test_sizes_out_of_range() -> None:
    with pytest.raises(CheckpointError, match="at least 1"):
        EncoderConfig.parse({**SIZES, "num_hidden_layers": 0})
