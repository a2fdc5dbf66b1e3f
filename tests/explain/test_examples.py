"""Images and examples of several kinds: what is taken away, whose figures are whose, and what is known to decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from steelyard.explain.examples import ExampleSubject, SoundPart
from steelyard.explain.methods import METHODS, likelihoods
from steelyard.explain.subject import at_once, log_odds
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.encoder import EncoderConfig
from steelyard.models.fusion import FusionClassifier, FusionConfig
from steelyard.models.inputs import Fused, FusedInputs, ImageInputs, TextInputs
from steelyard.models.seq2seq import WhisperConfig
from steelyard.models.vision import VisionConfig, VisionTransformer
from steelyard.text.tokenizer import Tokenizer

SIDE, PATCH = 16, 4


def with_square(draw: torch.Generator, decided: bool) -> tuple[torch.Tensor, int]:
    """A grey image, perhaps with a bright square in one patch; and which patch."""
    image = torch.randint(90, 160, (1, SIDE, SIDE), generator=draw).to(torch.uint8)
    row, column = (int(torch.randint(0, SIDE // PATCH, (1,), generator=draw)) for _ in range(2))
    if decided:
        image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 255
    return image, row * (SIDE // PATCH) + column


@pytest.fixture(scope="module")
def seer() -> Classifier:
    """A vision transformer that tells whether there is a bright square."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = VisionConfig(image_size=SIDE, num_channels=1, patch_size=PATCH, classes=2, **sizes)
        network = VisionTransformer(config)
        draw, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(120):
            labels = torch.randint(0, 2, (32,), generator=draw)
            images = torch.stack([with_square(draw, bool(label))[0] for label in labels])
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert float(loss.detach()) < 0.1
    return Classifier(network.eval().requires_grad_(False), ImageInputs(1, SIDE), ("plain", "square"))


@pytest.mark.parametrize("method", ["lrp", "occlusion", "integrated_gradients"])
def test_the_patch_that_decides_has_the_largest_share(seer: Classifier, method: Any) -> None:
    draw, hits = torch.Generator().manual_seed(1), 0
    for _ in range(15):
        image, patch = with_square(draw, decided=True)
        shares = at_once(METHODS[method](ExampleSubject(seer, image, 1)))
        hits += int(shares.units.argmax()) == patch
    assert hits >= 13


def test_figures_of_pixels_go_to_their_patches(seer: Classifier) -> None:
    """Also where patches do not divide the image: the last ones are smaller."""
    network = ConvNet(ConvNetConfig(image_size=15, num_channels=3, widths=(8, 16), blocks=1, classes=2)).eval()
    plain = Classifier(network.requires_grad_(False), ImageInputs(3, 15), ("a", "b"))
    image = torch.randint(0, 256, (3, 15, 15), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    subject = ExampleSubject(plain, image, 0)
    assert subject.units == 25  # patches of three pixels
    figures = torch.rand(1, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    found = subject.spread((figures,))
    expected = [
        float(figures[0, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].double().sum())
        for row in range(5)
        for column in range(5)
    ]
    assert found[:-1].tolist() == pytest.approx(expected)
    assert float(found[-1]) == pytest.approx(0, abs=1e-9)
    taken = at_once(subject.taken())
    with torch.no_grad():
        assert taken.value == pytest.approx(float(log_odds(network(image[None]), 0)), abs=1e-5)


@pytest.fixture(scope="module", params=["late", "gated", "cross-attention"])
def joined(request: pytest.FixtureRequest, tiny_tokenizer_folder: Path) -> tuple[Classifier, Fused]:
    how: Literal["late", "gated", "cross-attention"] = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        network = FusionClassifier(
            FusionConfig(
                how=how,
                width=16,
                classes=3,
                text=EncoderConfig(vocab_size=512, **sizes),
                image=ConvNetConfig(image_size=14, num_channels=3, widths=(8,), blocks=1),
                audio=WhisperConfig(
                    vocab_size=8,
                    num_mel_bins=8,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_ffn_dim=24,
                    decoder_ffn_dim=24,
                    **heads,
                ),
            )
        )
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.data *= 2
    inputs = FusedInputs(TextInputs(Tokenizer.load(tiny_tokenizer_folder), 64), ImageInputs(3, 14), 8)
    draw = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (3, 14, 14), generator=draw).to(torch.uint8)
    example = Fused(inputs.text.tokens("The steelyard weighs"), image, torch.randn(8, 90, generator=draw))  # type: ignore[union-attr]
    return Classifier(network.eval().requires_grad_(False), inputs, ("a", "b", "c")), example


def test_every_kind_has_its_units(joined: tuple[Classifier, Fused]) -> None:
    classifier, example = joined
    subject = ExampleSubject(classifier, example, 1)
    kinds = [unit.kind for unit in subject.names]
    assert len(kinds) == subject.units
    assert {kind: kinds.count(kind) for kind in kinds} == {"text": len(example.tokens or []), "image": 49, "audio": 5}
    every = torch.ones(1, subject.units, dtype=torch.bool)
    with torch.no_grad():
        whole = classifier.network(*classifier.inputs.batch([example])).log_softmax(-1)[0, 1]
        silent = Fused(None, example.image, example.features)
        without = classifier.network(*classifier.inputs.batch([silent])).log_softmax(-1)[0, 1]
    assert float(at_once(likelihoods(subject, every))[0]) == pytest.approx(float(whole), abs=1e-5)
    every[0, : len(example.tokens or [])] = False
    assert float(at_once(likelihoods(subject, every))[0]) == pytest.approx(float(without), abs=1e-5)


@pytest.mark.parametrize("method", ["lrp", "integrated_gradients", "gradient_x_input"])
def test_shares_of_all_kinds_add_up(joined: tuple[Classifier, Fused], method: Any) -> None:
    """Whatever is there: what is not has no unit, and nothing falls to it."""
    classifier, example = joined
    for some in (("text", "image", "audio"), ("text", "audio"), ("image",)):
        part = example.only(some)
        subject = ExampleSubject(classifier, part, 2)
        found = at_once(METHODS[method](subject))
        assert [*dict.fromkeys(unit.kind for unit in subject.names)] == list(some)
        assert bool(found.units.isfinite().all())
        assert float(found.units.abs().sum()) > 0
        with torch.no_grad():
            value = log_odds(classifier.network(*classifier.inputs.batch([part])), 2)
        assert found.value == pytest.approx(float(value), abs=1e-5)
        told = found.base + float(found.units.sum()) + found.rest + found.residual
        assert told == pytest.approx(found.value, abs=1e-9)


def test_moments_of_a_sound() -> None:
    features = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    part = SoundPart(features)
    assert (part.units, part.names) == (3, ["0.00 s", "0.20 s", "0.40 s"])
    kept = part.without([True, False, True])
    assert torch.equal(kept[:, 20:40], torch.zeros(4, 20))
    assert torch.equal(kept[:, 40:], features[:, 40:])
    found = part.spread(torch.ones(1, 4, 60))
    assert found.tolist() == [80, 80, 40]
    assert SoundPart(torch.zeros(4, 30_000)).units == 100
