"""Shares against enumeration, against captum, and against what is known to have decided."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch import nn

import deciding as explained
from steelyard.explain import faithfulness
from steelyard.explain.decoders import AnswerSubject, LabelSubject
from steelyard.explain.explainer import likeliest, open_decoder
from steelyard.explain.methods import METHODS, likelihoods
from steelyard.explain.subject import Steps, Taken, at_once, log_odds
from steelyard.explain.texts import TextSubject
from steelyard.infer.request import Method
from steelyard.models.classifiers import Classifier, of_texts
from steelyard.models.inputs import padded
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

TEXT = f"the user {explained.DECIDES} weight model rules"


def subject_of(classifier: Classifier, text: str, target: int) -> TextSubject:
    return TextSubject(classifier, classifier.text.all_tokens(text), target)


class Embedded(nn.Module):
    """A classifier from its embeddings on, as captum wants it."""

    def __init__(self, classifier: Classifier, tokens: list[int], target: int) -> None:
        super().__init__()
        self.network, self.target = classifier.network, target
        self.token_ids, self.lengths = padded([tokens])
        self.layer = next(layer for layer in self.network.modules() if isinstance(layer, nn.Embedding))

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        odds = []
        for one in embedded:
            hook = self.layer.register_forward_hook(lambda *_, one=one: one[None])
            odds.append(log_odds(self.network(self.token_ids, self.lengths), self.target))
            hook.remove()
        return torch.cat(odds)


@pytest.mark.parametrize("method", ["lrp", "occlusion", "integrated_gradients", "gradient_x_input"])
def test_the_word_that_decides_has_the_largest_share(classifier: Classifier, method: Method) -> None:
    tokenizer, draw = classifier.text.tokenizer, random.Random(1)
    decisive = set(tokenizer.encode_plain(f" {explained.DECIDES}")) | set(tokenizer.encode_plain(explained.DECIDES))
    hits = 0
    for _ in range(20):
        subject = subject_of(classifier, text := explained.sentence(draw, True), 1)
        shares = at_once(METHODS[method](subject)).units
        hits += classifier.text.all_tokens(text)[int(shares.argmax())] in decisive
    assert hits >= 17


def test_plain_gradients_are_captums(classifier: Classifier) -> None:
    tokens = classifier.text.all_tokens(TEXT)
    subject, network = TextSubject(classifier, tokens, 1), Embedded(classifier, tokens, 1)
    embedded = network.layer(torch.tensor([tokens]))
    expected = InputXGradient(network).attribute(embedded.clone().requires_grad_())[0].sum(-1)
    found = at_once(METHODS["gradient_x_input"](subject))
    assert torch.allclose(found.units, expected.double(), atol=1e-5)
    base = network.layer.weight.mean(0).expand_as(embedded)
    integrated = IntegratedGradients(network).attribute(embedded, base, n_steps=16, method="riemann_middle")
    found = at_once(METHODS["integrated_gradients"](subject))
    assert torch.allclose(found.units, integrated[0].sum(-1).double(), atol=1e-4)
    assert found.value == pytest.approx(float(network(embedded)), abs=1e-5)
    assert found.base == pytest.approx(float(network(base)), abs=1e-5)
    assert abs(found.residual) < 0.3 * abs(found.value - found.base)  # sixteen places of a steep way


def test_occlusion_is_enumeration(classifier: Classifier) -> None:
    tokens = classifier.text.all_tokens(TEXT)
    found = at_once(METHODS["occlusion"](TextSubject(classifier, tokens, 1)))
    for place in range(len(tokens)):
        rest = [*tokens[:place], *tokens[place + 1 :]]
        with torch.no_grad():
            both = [classifier.network(*padded([row])).log_softmax(-1)[0, 1] for row in (tokens, rest)]
        assert float(found.units[place]) == pytest.approx(float(both[0] - both[1]), abs=1e-5)


def test_long_texts_are_explained_by_their_windows(classifier: Classifier) -> None:
    """What a text is said to be is the mean over windows; the shares are those of all."""
    narrow = replace(classifier, inputs=replace(classifier.text, window=8))
    text = " ".join(["the user model rules"] * 6 + [explained.DECIDES, "weight"])
    subject = subject_of(narrow, text, 1)
    assert subject.units == len(narrow.text.all_tokens(text)) > 24
    shares = at_once(METHODS["lrp"](subject))
    decisive = set(narrow.text.tokenizer.encode_plain(f" {explained.DECIDES}"))
    assert narrow.text.all_tokens(text)[int(shares.units.argmax())] in decisive
    every = torch.ones(1, subject.units, dtype=torch.bool)
    (whole,) = at_once(likelihoods(subject, every)).tolist()
    assert whole == pytest.approx(float(of_texts(narrow, [text])[0][0, 1]), abs=1e-5)
    none = at_once(likelihoods(subject, ~every))
    empty = of_texts(narrow, [""])[0] if not narrow.text.tokenizer.encode_plain("", add_special_tokens=True) else None
    assert empty is not None
    assert float(none[0]) == pytest.approx(float(empty[0, 1]), abs=1e-5)


class Sum:
    """Three units of known worth: log p = -1 - what is missing."""

    units, baseline, computed = 4, "nothing", 0
    worth = torch.tensor([0.1, 2.0, 0.0, 0.5], dtype=torch.float64)

    def taken(self, *, rules: bool = False, share: float = 1.0) -> Steps[Taken]:
        raise AssertionError
        yield

    def spread(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        raise AssertionError

    def likelihood(self, kept: torch.Tensor) -> Steps[torch.Tensor]:
        yield
        return -1 - (~kept).double() @ self.worth


def test_faithfulness_by_hand() -> None:
    found, chance = at_once(faithfulness.measure(Sum(), Sum.worth))
    # ceil(4 share) of the grid 0, .05, .1, .2, .5, 1: 0, 1, 1, 1, 2, 4 units, the best first
    going = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.5, 2.6])
    coming = torch.tensor([2.6, 0.6, 0.6, 0.6, 0.1, 0.0])
    grid = torch.tensor([0, 0.05, 0.1, 0.2, 0.5, 1])
    expected = [torch.trapezoid(torch.exp(-1 - gone), grid) for gone in (going, coming)]
    assert found.deletion == pytest.approx(float(expected[0]), abs=1e-6)
    assert found.insertion == pytest.approx(float(expected[1]), abs=1e-6)
    whole = torch.exp(torch.tensor(-1.0))
    for got, gone in ((found.comprehensiveness, going), (found.sufficiency, coming)):
        assert got == pytest.approx(float((whole - torch.exp(-1 - gone[1:5])).mean()), abs=1e-6)
    assert found.deletion < chance.deletion
    assert found.insertion > chance.insertion
    assert found.comprehensiveness > chance.comprehensiveness
    assert found.sufficiency < chance.sufficiency


def test_relevance_is_more_faithful_than_chance(classifier: Classifier) -> None:
    draw, better = random.Random(2), 0
    for _ in range(20):
        subject = subject_of(classifier, explained.sentence(draw, True), 1)
        shares = at_once(METHODS["lrp"](subject))
        found, chance = at_once(faithfulness.measure(subject, shares.units))
        better += found.deletion < chance.deletion and found.comprehensiveness > chance.comprehensiveness
    assert better >= 17


@pytest.mark.parametrize("rules", [False, True])
def test_a_decoder_block_by_block_is_the_whole(tiny_model: Path, rules: bool) -> None:
    """The gradient that is handed from block to block is that of one graph; by the rules too."""
    from steelyard.explain.rules import Rules
    from steelyard.models.attention import PackedAttention

    decoder, tokenizer = open_decoder(tiny_model), Tokenizer.load(tiny_model)
    prompt, answer = tokenizer.encode("The steelyard weighs"), tokenizer.encode(" exactly with")
    subject = AnswerSubject(decoder, None, prompt, answer, range(len(prompt)))
    taken = at_once(subject.taken(rules=rules))
    tokens = torch.tensor(prompt + answer[:-1])
    leaf = decoder.embed(tokens).detach().requires_grad_()
    embed, decoder.embed = decoder.embed, lambda ids: leaf  # type: ignore[method-assign]
    try:
        attend = PackedAttention([len(tokens)])
        if rules:
            with Rules():
                states = decoder(tokens, torch.arange(len(tokens)), attend)
        else:
            states = decoder(tokens, torch.arange(len(tokens)), attend)
    finally:
        decoder.embed = embed  # type: ignore[method-assign]
    logits = decoder.logits(states[len(prompt) - 1 :])
    centred = logits[torch.arange(len(answer)), torch.tensor(answer)] - logits.mean(-1)
    (expected,) = torch.autograd.grad(centred.sum(), leaf)
    assert taken.value == pytest.approx(float(centred.sum().detach()), abs=1e-4)
    assert torch.allclose(taken.gradients[0], expected, atol=1e-4)


def test_a_decoders_likelihood_and_lens(tiny_model: Path) -> None:
    """Rows of any length beside each other; the last layer says what the model says."""
    decoder, tokenizer = open_decoder(tiny_model), Tokenizer.load(tiny_model)
    prompt = tokenizer.encode("The steelyard weighs exactly with one moving")
    following = at_once(likeliest(decoder, None, prompt))
    subject = AnswerSubject(decoder, None, prompt, [following, 7], range(1, len(prompt)))
    kept = torch.rand(6, subject.units, generator=torch.Generator().manual_seed(0)) < 0.5
    found = at_once(likelihoods(subject, kept))
    for row, logprob in zip(kept.tolist(), found.tolist(), strict=True):
        left = [prompt[0], *(token for token, there in zip(prompt[1:], row, strict=True) if there)]
        only = AnswerSubject(decoder, None, left, [following, 7], range(1, len(left)))
        (alone,) = at_once(only.likelihood(torch.ones(1, len(left) - 1, dtype=torch.bool))).tolist()
        assert logprob == pytest.approx(alone, abs=1e-5)
    at_once(subject.taken())
    lens = at_once(subject.lens(3))
    assert len(lens) == decoder.config.layers + 1
    assert lens[-1][0][0] == following


def test_a_decoder_wears_its_adapter(tiny_model: Path) -> None:
    decoder, tokenizer = open_decoder(tiny_model), Tokenizer.load(tiny_model)
    adapter = Adapter.create(decoder, rank=2, alpha=8, targets=["q_proj", "down_proj"])
    for _, tensor in adapter.parameters():
        tensor.data.normal_(generator=torch.Generator().manual_seed(1))
        tensor.requires_grad_(False)
    prompt = tokenizer.encode("The steelyard weighs exactly")
    plain, worn = (AnswerSubject(decoder, each, prompt, [5], range(len(prompt))) for each in (None, adapter))
    one, other = (at_once(METHODS["lrp"](subject)) for subject in (plain, worn))
    assert one.value != other.value
    assert not torch.allclose(one.units, other.units)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("window", [None, 8, 13])
@pytest.mark.parametrize("believed", [False, True])
def test_no_more_is_computed_than_was_reserved(
    classifier: Classifier, method: Method, window: int | None, believed: bool
) -> None:
    """For every method, with and without windows, faithfulness, and a class that is named."""
    from steelyard.infer import effort
    from steelyard.infer.request import Explain
    from steelyard.models.inputs import around

    read = replace(classifier, inputs=replace(classifier.text, window=window))
    outside = sum(map(len, around(read.text.tokenizer)))
    for words in (1, 4, 9, 30):
        tokens = read.text.all_tokens(
            " ".join(["the", "weight", explained.DECIDES][: min(3, words)] * (words // 3 + 1))
        )
        tokens = tokens[:60]
        subject = TextSubject(read, tokens, 1)
        shares = at_once(METHODS[method](subject))
        if believed:
            at_once(faithfulness.measure(subject, shares.units))
        asked = Explain(method=method, faithfulness=believed, target=1)
        assert subject.computed <= effort.most(asked, effort.in_windows(len(tokens), window, outside))


def test_a_label_is_explained_against_the_others(tiny_model: Path) -> None:
    """At the token where it parts from most of them; its probability is that among those that part there."""
    decoder, tokenizer = open_decoder(tiny_model), Tokenizer.load(tiny_model)
    prompt = tokenizer.encode("The steelyard weighs")
    labels = [[5, 9, 2], [5, 11, 2], [7, 2], [5, 11, 13]]
    for target, begin, own, others in ((0, [5], 9, [11]), (2, [], 7, [5]), (1, [], 5, [7])):
        subject = LabelSubject(decoder, None, prompt, labels, target, range(len(prompt)))
        expected = AnswerSubject(decoder, None, [*prompt, *begin], [own], range(len(prompt)))
        with torch.no_grad():
            logits = at_once(expected.following([*prompt, *begin]))
        taken = at_once(subject.taken())
        assert taken.value == pytest.approx(float(logits[own] - logits[others].mean()), abs=1e-4)
        every = torch.ones(1, len(prompt), dtype=torch.bool)
        among = logits[[own, *others]].double().log_softmax(0)[0]
        assert float(at_once(subject.likelihood(every))[0]) == pytest.approx(float(among), abs=1e-5)
