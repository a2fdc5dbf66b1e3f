"""Rows made ready: near-duplicates against all pairs, personal data by its form, Parquet, what texts are like."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data import chat, near_duplicates, personal, quality
from steelyard.data.chat import FormatConfig
from steelyard.data.readers import parquet_rows
from steelyard.errors import ConfigError, DataError


def documents(count: int, seed: int) -> list[str]:
    """Random texts, half of them changed copies of others: a few words, many, or all."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(400)]
    found = [" ".join(draw.choices(words, k=draw.randint(20, 200))) for _ in range(count // 2)]
    for _ in range(count // 2):
        copied = draw.choice(found[: count // 2]).split()
        for _ in range(draw.choice([0, 1, 2, 5, 40])):
            copied[draw.randrange(len(copied))] = draw.choice(words)
        found.append(" ".join(copied))
    return found


@pytest.mark.parametrize("threshold", [0.9, 0.8, 0.6])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    texts = documents(300, 0)
    sets = [near_duplicates.runs(text) for text in texts]
    firsts = near_duplicates.twins(texts, threshold)
    missed = 0
    for number, first in enumerate(firsts):
        if first != number:
            assert near_duplicates.alike(sets[number], sets[first]) >= threshold, "never a false one"
            assert firsts[first] == first
        else:
            kept = [other for other in range(number) if firsts[other] == other]
            missed += any(near_duplicates.alike(sets[number], sets[other]) >= threshold for other in kept)
    assert sum(first != number for number, first in enumerate(firsts)) > 30
    assert missed <= 3, "hashes miss few"


def test_leaks_are_found_in_either_order() -> None:
    learnt, held = documents(100, 1), documents(100, 2)
    planted = {3: learnt[10], 50: learnt[20] + " end", 77: learnt[30].upper()}
    held = [planted.get(number, text) for number, text in enumerate(held)]
    found = near_duplicates.leaks(learnt, held, 0.8)
    assert found.keys() == planted.keys()
    assert [learnt[number] for number in found.values()] == [learnt[10], learnt[20], learnt[30]]


@pytest.mark.parametrize("text", ["", " ", "?!", "one", "One.", "a b c d e"])
def test_short_texts_have_one_run(text: str) -> None:
    assert len(near_duplicates.runs(text)) == 1
    assert near_duplicates.twins([text, text, "another thing"], 1.0) == [0, 0, 2]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Mail jane.doe+x@mail.example.co.uk now", "Mail [EMAIL] now"),
        ("call +44 20 7946 0958 or (212) 555-2368", "call [PHONE] or [PHONE]"),
        ("card 4111 1111 1111 1111 and 5500-0000-0000-0004", "card [CARD] and [CARD]"),
        ("to GB82 WEST 1234 5698 7654 32.", "to [IBAN]."),
        ("from 10.1.2.3 and fe80::1ff:fe23:4567:890a", "from [IP] and [IP]"),
        ("My card is 4111 1111 1111 1111. It is mine", "My card is [CARD]. It is mine"),
        ("card 4111 1111 1111 1111 12/27 ok", "card [CARD] 12/27 ok"),
        ("IBAN AT61 1904 3002 3457 3201 BIC BKAUATWW", "IBAN [IBAN] BIC BKAUATWW"),
        ("host 192.168.4.20.", "host [IP]."),
        ("order 12 4111 1111 1111 1111", "order 12 [CARD]"),
        ("no card: 4111 1111 1111 1112", "no card: 4111 1111 1111 1112"),
        ("version 1.2.3, at 10:30:15, on 2024-01-02, pi 3.14159265358979", None),
        ("a@b, @handle, x@y", None),
        ("zeros 0000 0000 0000 0000", None),
        ("", None),
    ],
)
def test_personal_data_by_its_form(text: str, redacted: str | None) -> None:
    found = personal.find(text, region="US")
    assert personal.redact(text, found) == (text if redacted is None else redacted)


def test_without_a_region_only_international_numbers_are_phones() -> None:
    assert [found.kind for found in personal.find("+1 212 555 2368 and 212 555 2368")] == ["phone"]


@given(st.lists(st.sampled_from(["a@b.com ", "10.0.0.1 ", "word ", "+44 20 7946 0958 ", "é\n", "4111111111111111 "])))
def test_places_are_in_order_and_apart(parts: list[str]) -> None:
    text = "".join(parts)
    found = personal.find(text)
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))
    assert sum(each.kind == "email" for each in found) == parts.count("a@b.com ")


def test_a_long_text_is_looked_through_in_time() -> None:
    text = "1" * 3_000_000 + " a@b.com " + "a." * 500_000
    assert [found.kind for found in personal.find(text, ("email", "card", "iban", "ip"))] == ["email"]


@pytest.mark.parametrize(("kinds", "region"), [(("name",), None), (("email",), "ZZ")])
def test_what_is_not_known_is_named(kinds: tuple[str, ...], region: str | None) -> None:
    with pytest.raises(ConfigError, match=r"'name'|'ZZ'"):
        personal.find("x", kinds, region)


def test_what_texts_are_like() -> None:
    assert quality.of("Some plain words.\nAnd others.").problems == ()
    assert quality.of("!!! *** ??? ### $$$ %%% &&&").problems == ("mostly signs",)
    assert quality.of("THIS IS ALL LOUD AND LONG").problems == ("all capitals",)
    assert quality.of("again\nagain\nagain\n").problems == ("repeats its lines",)
    assert quality.of("").problems == ("no words",)
    english, spanish = (
        "The house on the hill was built by my father",
        "La casa en la colina fue construida por mi padre",
    )
    assert quality.languages([english, spanish, spanish, "short"]) == {"en": 1, "es": 2, "?": 1}


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_rows(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    found = chat.read(parquet(tmp_path / "a.parquet", messages=turns), FormatConfig())
    assert [message.content for message in found[2].messages] == ["a", "b"]
    assert found[2].line == 3
    labelled = chat.read(parquet(tmp_path / "b.parquet", text=["x", "y"], label=["ham", "spam"]), FormatConfig())
    assert [(row.text, row.label) for row in labelled] == [("x", "ham"), ("y", "spam")]
    plain = chat.read(parquet(tmp_path / "c.parquet", text=["x" * 50, "y"]), FormatConfig())
    assert plain[1].messages[0].content == "y"
    many = parquet(tmp_path / "d.parquet", text=[str(number) for number in range(5000)])
    assert [row["text"] for _, row in parquet_rows(many)] == [str(number) for number in range(5000)]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"no parquet at all"])
def test_what_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="no Parquet file"):
        chat.read(tmp_path / "a.parquet", FormatConfig())


def test_a_value_that_rows_have_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet:2: field 'text': a bytes"):
        list(parquet_rows(parquet(tmp_path / "a.parquet", text=[None, b"x"])))


def test_a_small_parquet_file_that_is_large_inside(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["x" * (9 << 20)] * 40)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="a row from 1 on is over 8 MB"):
        list(parquet_rows(path))
