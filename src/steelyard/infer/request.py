"""What is asked of an engine and what it answers: the messages between the HTTP process and the engine process.

Plain msgspec structs, no torch: both processes import this file. It knows tokens and text, not HTTP.
A prompt arrives as token ids; what comes back is text, token ids and log-probabilities, one `Output` per
choice and step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from steelyard.infer.sound import SOUND_RATE, Heard, Hearing, Hears

FinishReason = Literal["stop", "length"]
Priority = Literal["interactive", "batch"]
Task = Literal["generate", "embed", "classify", "tag", "transcribe"]
"""What a model does with what it is given."""
CacheKind = Literal["bfloat16", "int8"]
"""How an engine keeps keys and values."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. The defaults draw from the model's own distribution."""

    max_tokens: int = 16
    """Most tokens to generate per choice; 0 only reads the prompt, to score it."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k most likely tokens; 0 means all."""
    min_p: float = 0.0
    """Only tokens at least this likely relative to the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token generated so far."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token per time that it was generated."""
    logit_bias: dict[int, float] = {}
    """Added to the logits, by token id."""
    seed: int | None = None
    """Draws are keyed by (seed, choice, position); None takes a fresh seed."""
    stop: tuple[str, ...] = ()
    """Strings that end a choice; they are not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a choice besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many most likely ones; None returns none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens but the first, once for all choices."""


class Beam(msgspec.Struct, frozen=True, kw_only=True):
    """Beam search: the likeliest continuations as a whole."""

    width: int
    """Beginnings that are kept."""
    length_penalty: float = 1.0
    """A continuation's log-probability is divided by its length to this power; above 0 longer ones are favoured."""
    early_stopping: bool | Literal["never"] = False
    """True: end when `width` continuations have; False: when none that is as long as now could be better; "never": when
    none could, however long.
    """
    groups: int = 1
    """Groups that keep their beginnings apart; `width` is a multiple of them."""
    diversity: float = 0.0
    """What a group pays for a token that groups before it have chosen at this place."""


Method = Literal["lrp", "occlusion", "integrated_gradients", "gradient_x_input", "random"]
"""How an explanation is found."""


class Explain(msgspec.Struct, frozen=True, kw_only=True):
    """An explanation of what the model says of a prompt, instead of an answer."""

    method: Method = "lrp"
    target: int | None = None
    """Of a classifier: the class that is explained; None: the likeliest."""
    answer: list[int] = []
    """Of a decoder: the tokens after the prompt that are explained; none: the likeliest of `against`, or its own,"""
    own: int = 0
    """of which so many tokens at the most are written first; 0: one."""
    against: list[list[int]] = []
    """Of a decoder: the tokens of other answers, their ends included; what is explained is why it is none of these."""
    places: list[int] | None = None
    """Of a decoder: which tokens of the prompt have a share; None: all that are no control tokens."""
    faithfulness: bool = True
    """Whether it is measured how far the shares can be believed."""
    lens: int = 0
    """Of a decoder: how many of the likeliest next tokens each layer tells."""
    rows: list[tuple[list[int], list[int]]] = []
    """Of a decoder: prompts and answers that it learnt from,"""
    nearest: int = 0
    """and how many of them are told that are most like what is explained."""


class Faithfulness(msgspec.Struct, frozen=True):
    """What a probability does as units go or come by an order: see `steelyard.explain.faithfulness`."""

    deletion: float
    insertion: float
    comprehensiveness: float
    sufficiency: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Each unit's share in a value."""

    places: list[int]
    """The units: tokens of the prompt; of examples that are more than a text their numbers."""
    units: list[tuple[str, str]] = []
    """Of such: what kind each is of, and its name."""
    shares: list[float]
    """Of each, in nats of the value."""
    rest: float
    """The share of what is no unit."""
    value: float
    base: float
    """Of nothing, where the method compares with it."""
    residual: float
    """value - base - rest - sum of the shares: what they do not account for."""
    baseline: str
    """What is there instead of a unit that is taken away."""
    target: int | None = None
    """The class."""
    answer: list[int] = []
    """The tokens."""
    faithfulness: Faithfulness | None = None
    chance: Faithfulness | None = None
    """The same of orders drawn at random."""
    lens: list[list[tuple[int, str, float]]] | None = None
    """Of each layer tokens, their texts and probabilities."""
    nearest: list[tuple[int, float]] | None = None
    """Of rows their numbers, and the cosines of their gradients with that of what is explained."""
    computed_tokens: int = 0
    """That went through the network, each pass back counted twice: what is paid for."""


PATCH = 64
"""Values of an image, of every channel, that count as a token."""
MOMENT = SOUND_RATE // 50
"""Samples of sound that do so beside a text or an image."""


class Sees(msgspec.Struct, frozen=True):
    """What a model that sees takes of an image."""

    channels: int
    """1: grey. 3: red, green, blue."""
    side: int
    """Pixels; images are fitted into a square."""
    patches: int = 1
    """Into which it is parted where it is explained."""


def example_tokens(text: int, values: int, samples: int) -> int:
    """What an example of so many tokens, values of an image and samples of a sound is paid for."""
    return text + -(-values // PATCH) + (max(2, -(-samples // MOMENT)) if samples else 0)


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One prompt and how to continue it."""

    id: str
    prompt: list[int]
    sampling: Sampling = Sampling()
    n: int = 1
    """Independent choices for this prompt."""
    adapter: str | None = None
    """Name of a LoRA adapter that the engine has loaded; None is the base model."""
    project: str = ""
    """Whose request it is: service is shared between projects, cached blocks never are."""
    priority: Priority = "interactive"
    """`batch` runs where `interactive` leaves room."""
    counted: bool = True
    """Whether the engine's figures count it; a canary is nobody's work."""
    words: list[str] | None = None
    """Of a tagger: the words of a sentence; `prompt` then only says how many tokens they are."""
    paths: int = 1
    """Of a tagger: how many sequences of tags are wanted."""
    grammar: str | None = None
    """What the answer has to be, as `steelyard.text.grammar` makes it,"""
    grammar_field: str = "response_format"
    """and the field that it came from, which errors name."""
    sound: bytes | None = None
    """Of a model that hears, instead of a prompt: float32 samples of 16 kHz, at most a piece of them."""
    hearing: Hearing = Hearing()
    image: bytes | None = None
    """Of a model that sees: pixels, channel by channel, row by row."""
    beam: Beam | None = None
    """Beam search instead of draws; `n` is how many of its continuations come back, the best first, at the end."""
    explain: Explain | None = None
    """Instead of an answer."""
    speculate: bool = True
    """Whether tokens may be guessed and confirmed several at once. They are the same either way."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free what it holds. An unknown id is ignored: it has just ended."""

    id: str


class Aborted(msgspec.Struct, frozen=True, kw_only=True, tag="aborted"):
    """An `Abort` of a request that had not ended: it came to this, and nothing more will be said of it."""

    id: str
    prompt_tokens: int
    """0 if it had not begun to run."""
    cached_tokens: int
    completion_tokens: list[int]
    """Of each choice."""


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Let requests wear the adapter in a folder by this name, from the answer on; swaps one that has the name."""

    id: str
    name: str
    path: str


class DropAdapter(msgspec.Struct, frozen=True, tag="drop_adapter"):
    """Forget an adapter's name; the requests that wear it run to their end."""

    id: str
    name: str


class AdapterChanged(msgspec.Struct, frozen=True, tag="adapter_changed"):
    """A `LoadAdapter` or `DropAdapter` is done; one that cannot be done is answered by a `Failure`."""

    id: str
    digest: str | None
    """Of the adapter that the name now means; None: of none."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """A generated token, its log-probability, and the most likely tokens at its place.

    Log-probabilities are the model's own, before temperature, penalties and filters.
    """

    token: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]]


class PromptLogprob(TokenLogprob, frozen=True):
    """A token of the prompt; see `TokenLogprob`."""

    rank: int
    """Its place among all tokens, 1 for the likeliest."""


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """The moments of a request in the engine: seconds of the monotonic clock, which a machine's processes share."""

    arrived: float
    """The engine's process received it."""
    scheduled: float
    """The first of its choices was let in; that a preempted one is let in again does not count."""
    first_token: float
    """Its first token was drawn; where it asks for none, the prompt was read."""
    last_token: float
    """The last of its choices ended."""

    @property
    def queue_seconds(self) -> float:
        """How long it waited for its turn."""
        return self.scheduled - self.arrived

    @property
    def prefill_seconds(self) -> float:
        """How long it took from there to its first token."""
        return self.first_token - self.scheduled

    @property
    def decode_seconds(self) -> float:
        """How long it took from there to its last, preemptions included."""
        return self.last_token - self.first_token


class LabelPath(msgspec.Struct, frozen=True):
    """A sequence of labels, one a word, by their numbers, and its log-probability."""

    labels: list[int]
    logprob: float


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output"):
    """What one step added to one choice of one request."""

    id: str
    choice: int
    text: str
    """New text; may be empty while a character or a possible stop string is incomplete."""
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[PromptLogprob] | None = None
    """The next tokens of the prompt, from the second on; in outputs of choice 0, before any other choice's first."""
    values: list[float] | None = None
    """Of what reads alone: an embedding; log-probabilities of the classes; or of each word's tag, by itself."""
    paths: list[LabelPath] | None = None
    """Of a tagger, the best first."""
    explanation: Explanation | None = None
    heard: Heard | None = None
    """Of a piece of a recording, whose transcript is the text; it begins with a space where a word does."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens generated so far for this choice, the end token included."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache, not computed."""
    score: float | None = None
    """Of beam search: the continuation's log-probability over its length to the power of the penalty."""
    rejected_tokens: int = 0
    """Of beam search, in the last output of a request: tokens of beginnings that did not come back."""
    timeline: Timeline | None = None
    """In the last output of a request."""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """The engine refuses what was asked (the asker's fault: `param`, `code`) or could not finish it (neither)."""

    id: str
    message: str
    param: str | None = None
    code: str | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First message of an engine: what it serves."""

    model: str
    checkpoint_id: str
    adapters: list[str]
    context: int
    """Most tokens that prompt and completion may have together."""
    vocabulary: int
    """Number of token ids: logit_bias and token prompts must be below it."""
    task: Task = "generate"
    labels: list[str] = []
    """Of a classifier or a tagger."""
    width: int = 0
    """Of embeddings."""
    kinds: list[str] = []
    """Of a classifier: what it reads, of text, image and audio."""
    window: int | None = None
    """Of a classifier of texts: longer ones are read in parts of so many tokens,"""
    around: int = 0
    """with so many around each."""
    sees: Sees | None = None
    hears: Hears | None = None
    """Of a model that transcribes."""


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag="fatal"):
    """The engine cannot start; it says why and exits. Not retried."""

    message: str


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """What an engine has done since its start, and is doing now."""

    steps: int = 0
    prompt_tokens: int = 0
    """Of the requests that have begun to run, every prompt once."""
    generated_tokens: int = 0
    looked_up_tokens: int = 0
    """Prompt tokens of sequences (each of a request's choices is one) that were looked for in the cache."""
    cached_tokens: int = 0
    """Those of them that were found."""
    drafted_tokens: int = 0
    """Guesses of speculative decoding."""
    accepted_tokens: int = 0
    """Those of them that were right."""
    preemptions: int = 0
    running: int = 0
    """Requests of which a choice runs."""
    waiting: int = 0
    """Requests of which none does."""
    used_blocks: int = 0
    """Blocks of the cache that are held."""
    blocks: int = 0


ToEngine = Request | Abort | LoadAdapter | DropAdapter
FromEngine = Ready | Output | Aborted | AdapterChanged | Failure | Fatal | EngineStats
