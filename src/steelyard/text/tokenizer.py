"""A checkpoint's tokenizer: text to token ids and back, its special tokens, the bytes of each token.

Loads `tokenizer.json` with the `tokenizers` library. Knows nothing of models, prompts or chat templates.

Control tokens in what users write. A chat template mixes its own control tokens (`<|im_end|>`) with the text of
messages, and `encode` reads both alike. So messages are guarded first: `guard` puts the noncharacter U+FDD0 into
every control token that a user spelled out, and `encode_rendered` then takes that spelling as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import tokenizers

from steelyard.errors import CheckpointError, RequestError
from steelyard.text.bounded import read_bytes, read_optional_object, token_content
from steelyard.text.token_bytes import Spelling

MAX_TOKENIZER_BYTES = 64 << 20
GUARD = "\ufdd0"
LONG = 4096
"""Characters from which on a text goes the library's way for several: other threads run meanwhile, and it is faster."""
Span = tuple[int, int]
"""Characters from one place up to another."""


class Tokenizer:
    """Text to token ids and back. Immutable after loading, and safe to use from several threads."""

    def __init__(
        self, inner: tokenizers.Tokenizer, spelling: Spelling, *, bos_id: int | None, eos_ids: frozenset[int]
    ) -> None:
        self._inner = inner
        self._spelling = spelling
        self._lock = Lock()
        self.bos_id = bos_id
        """The token that begins a text, if the model has one."""
        self.eos_ids = eos_ids
        """Every token that ends a text or a turn; may be empty."""
        self.vocabulary = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the largest token id."""
        added = inner.get_added_tokens_decoder()
        self.special_tokens: dict[int, str] = {id: token.content for id, token in added.items() if token.special}
        """Control tokens by id; decoding skips them."""
        contents = sorted(filter(None, self.special_tokens.values()), key=len, reverse=True)
        self._control = re.compile(f"((?:{'|'.join(map(re.escape, contents)) or '(?!)'})(?!{GUARD}))")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Raises:
            CheckpointError: tokenizer.json is missing, over 64 MB or broken, or an end token is not a token id.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"'{folder}' has no tokenizer.json: pull the checkpoint again, or save one into it with"
                " transformers' AutoTokenizer.save_pretrained"
            )
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
            decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder else None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is no Exception
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"'{path}' is no tokenizer: {reason}; pull the checkpoint again") from None
        # Settings saved from training would cut or pad what is encoded here.
        inner.no_truncation()
        inner.no_padding()
        return cls(inner, Spelling.of(decoder), bos_id=_bos_id(folder, inner), eos_ids=_eos_ids(folder, inner))

    @property
    def serialized(self) -> str:
        """The tokenizer as `tokenizer.json` has it."""
        return str(self._inner.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; control tokens spelled out in it become control tokens.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        return _ids(self._inner, text, add_special_tokens)

    def encode_plain(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text` as plain text: `<|im_end|>` in it is just these characters.

        Only control ("special") tokens are affected; other added tokens, such as `<think>`, are part of the text.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        return _ids(self._plain, text, add_special_tokens)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        return [encoding.ids for encoding in encodings]

    def guard(self, text: str) -> str:
        """`text` with a mark inside every control token, so that `encode_rendered` takes it as plain text."""
        return self._control.sub(lambda match: match[0][0] + GUARD + match[0][1:], text.replace(GUARD, ""))

    def guard_messages(self, messages: Iterable[dict[str, str]]) -> list[dict[str, str]]:
        """`messages` with every value guarded: what a chat template should be given of what users wrote."""
        return [{key: self.guard(value) for key, value in message.items()} for message in messages]

    def spans(
        self, text: str, *, add_special_tokens: bool = False, control: bool = False
    ) -> tuple[list[int], list[Span]]:
        """`encode_plain`, or with `control` `encode`, and which characters each token stands for; (0, 0): none.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        return _spans(self._inner if control else self._plain, text, add_special_tokens)

    def rendered_spans(self, text: str) -> tuple[str, list[int], list[Span]]:
        """`encode_rendered`, beside it the text without marks and which of its characters each token stands for.

        Tokens of what is marked stand for the whole of that.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        clean, ids, spans = "", list[int](), list[Span]()
        for piece, marked in self._pieces(text):
            begin = len(clean)
            clean += piece
            if marked:
                found = self._encode_inside(piece, first=not ids)
                where = [(begin, len(clean))] * len(found)
            else:
                found, inside = _spans(self._inner, piece, False)
                where = [(begin + first, begin + last) for first, last in inside]
            ids += found
            spans += where
        return clean, ids, spans

    def guard_all(self, value: Any) -> Any:
        """A JSON value with every text in it guarded, names included."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, dict):
            return {self.guard(str(key)): self.guard_all(inner) for key, inner in value.items()}
        return [self.guard_all(inner) for inner in value] if isinstance(value, list) else value

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a template's output over guarded messages. Marks are dropped, and what they mark is plain.

        Raises:
            RequestError: the text has a lone surrogate.
        """
        if GUARD not in text:
            return self.encode(text)
        ids: list[int] = []
        for piece, marked in self._pieces(text):
            ids += self._encode_inside(piece, first=not ids) if marked else self.encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary add nothing."""
        if self._spelling.kind == "other":
            return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        skipped = self.special_tokens if skip_special_tokens else {}
        text = b"".join(self.token_bytes(id) for id in ids if id not in skipped).decode(errors="replace")
        return strip_leading(text, self._spelling.strip)

    def token_text(self, id: int) -> str:
        """One token as text; part of a character shows as U+FFFD. An unknown id is empty."""
        return self.token_bytes(id).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token adds to a text, a leading space included. An unknown id is empty."""
        if (cached := self._bytes.get(id)) is None:
            token = self._inner.id_to_token(id) if 0 <= id < self.vocabulary else None
            cached = self._bytes[id] = b"" if token is None else self._spelling.to_bytes(token)
        return cached

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, spelled as tokenizer.json spells it."""
        return self._inner.token_to_id(token)

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both mean the same tokens by the same ids."""
        mine, others = (one._inner.get_vocab(with_added_tokens=True) for one in (self, other))
        return mine == others

    def state(self) -> dict[str, Any]:
        """What tokenizer.json says, as the library writes it."""
        found: dict[str, Any] = json.loads(self._inner.to_str())
        return found

    @cached_property
    def beginning(self) -> list[int]:
        """What `add_special_tokens` puts before a text, where it puts nothing behind it.

        A model that learnt with it needs it before every text.
        """
        plain, whole = (self.encode("a", add_special_tokens=flag) for flag in (False, True))
        return whole[: -len(plain)] if plain and whole[-len(plain) :] == plain else []

    @property
    def spelling(self) -> Spelling:
        """How the vocabulary spells bytes."""
        return self._spelling

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    @property
    def _plain(self) -> tokenizers.Tokenizer:
        with self._lock:
            return self._plain_copy

    @cached_property
    def _plain_copy(self) -> tokenizers.Tokenizer:
        # A second one: the switch belongs to the whole object, and other threads encode with the first.
        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.encode_special_tokens = True
        return copy

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """A rendered text in pieces, without marks, each with whether it is marked as plain."""
        clean = ""  # template text and unmarked messages since the last marked piece
        for piece in self._control.split(text):
            if GUARD not in piece:
                clean += piece
                continue
            if clean:
                yield clean, False
            yield piece.replace(GUARD, ""), True
            clean = ""
        if clean:
            yield clean, False

    def _encode_inside(self, text: str, *, first: bool) -> list[int]:
        """Plain text that does not begin the whole text: sentencepiece must not put its first space there."""
        if first or self._spelling.kind == "byte_level":
            return self.encode_plain(text)
        newline, ids = self.encode_plain("\n"), self.encode_plain("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.encode_plain(text)


def strip_leading(text: str, spaces: int) -> str:
    """`text` without up to `spaces` leading spaces."""
    return text[min(spaces, len(text) - len(text.lstrip(" "))) :] if spaces else text


def _ids(inner: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return _encoded(inner, text, add_special_tokens, inner.encode_batch_fast).ids


def _spans(inner: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    encoding = _encoded(inner, text, add_special_tokens, inner.encode_batch)
    return encoding.ids, encoding.offsets


def _encoded(
    inner: tokenizers.Tokenizer, text: str, add_special_tokens: bool, batch: Callable[..., list[tokenizers.Encoding]]
) -> tokenizers.Encoding:
    try:
        if len(text) > LONG:
            return batch([text], add_special_tokens=add_special_tokens)[0]
        return inner.encode(text, add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError):
        raise RequestError("the text has a lone surrogate (\\ud800 to \\udfff): send well-formed Unicode") from None


def _bos_id(folder: Path, inner: tokenizers.Tokenizer) -> int | None:
    token = token_content(read_optional_object(folder / "tokenizer_config.json").get("bos_token"))
    return None if token is None else inner.token_to_id(token)


def _eos_ids(folder: Path, inner: tokenizers.Tokenizer) -> frozenset[int]:
    """The end tokens that generation_config.json (else config.json) lists, and the tokenizer's own."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        declared: Any = read_optional_object(folder / name).get("eos_token_id")
        if declared is None:
            continue
        for id in declared if isinstance(declared, list) else [declared]:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 1 << 31:
                raise CheckpointError(f"'{folder / name}': eos_token_id holds {id!r}, which is no token id; correct it")
            found.add(id)
        break
    token = token_content(read_optional_object(folder / "tokenizer_config.json").get("eos_token"))
    own = None if token is None else inner.token_to_id(token)
    return frozenset(found if own is None else found | {own})
