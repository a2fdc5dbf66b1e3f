"""The recurrent classifier against the written formula of an LSTM, in float64, row by row."""

from __future__ import annotations

import torch

from steelyard.models.inputs import padded
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig


def lstm(x: torch.Tensor, layer: torch.nn.LSTM) -> torch.Tensor:
    """`[L, E]` -> `[L, H]`: i, f, g, o as torch orders them."""
    w, u, b, c = (getattr(layer, f"{name}_l0").double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = torch.zeros(u.shape[1], dtype=torch.float64)
    states = []
    for step in x.double():
        i, f, g, o = (w @ step + b + u @ hidden + c).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states)


def test_every_row_is_the_formula_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    config = RecurrentConfig(vocab_size=50, embedding_size=7, hidden_size=9, dense_size=5, classes=3)
    network = RecurrentClassifier(config).eval()
    rows = [[1, 2, 3, 4, 5], [7], [9, 9, 9], list(range(20))]
    with torch.no_grad():
        found = network(*padded(rows))
        for row, logits in zip(rows, found, strict=True):
            states = lstm(lstm(network.embedding.weight[torch.tensor(row)], network.sequence), network.summary)
            dense = torch.relu(network.dense.weight.double() @ states[-1] + network.dense.bias.double())
            expected = network.classifier.weight.double() @ dense + network.classifier.bias.double()
            torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_of_training_alone() -> None:
    torch.manual_seed(0)
    network = RecurrentClassifier(RecurrentConfig(vocab_size=50, dropout=0.5))
    batch = padded([[1, 2, 3]])
    network.train()
    assert not torch.equal(network(*batch), network(*batch))
    network.eval()
    assert torch.equal(network(*batch), network(*batch))
