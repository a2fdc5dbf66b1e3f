"""The verbs that administer a server: on its database, beside it or without it."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from steelyard.cli import main
from steelyard.serve.auth import KeyRing
from steelyard.serve.billing.ledger import Ledger, Reservation
from steelyard.serve.billing.prices import Counts, newest
from steelyard.store import tables
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import open_secrets

MONTH = time.strftime("%Y-%m", time.gmtime())


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert (ended.value.code or 0) == code, captured.err
    return json.loads(captured.out.splitlines()[-1])


def spend(home: Path, project: str) -> int:
    """A request of 1,000 prompt and 500 generated tokens."""
    secrets = open_secrets()
    with opened(sqlite_url(home / "steelyard.db"), role="server") as database:
        ledger = Ledger(database, secrets.chain)
        quote = database.read_now(newest).quote("tiny")
        counts = Counts(1000, 200, 500)
        asyncio.run(
            ledger.reserve(Reservation("r", project, "key_x", "tiny", "completions", quote, quote.most(counts)))
        )
        cost = ledger.settle("r", counts).result()
        assert cost is not None
        head = ledger.head()
        line = {"sequence": head.sequence, "mac": head.mac.hex()}
        (home / "ledger-heads.jsonl").write_text(json.dumps(line) + "\n{broken\n")
        return cost


def test_projects_and_keys(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    project = run(capsys, "projects", "create", "search")
    other = run(capsys, "projects", "create", "other")
    assert [row["name"] for row in run(capsys, "projects", "list")["projects"]] == ["search", "other"]
    key = run(capsys, "keys", "create", "laptop", "-p", "search", "--scope", "inference")
    admin = run(capsys, "keys", "create", "ops", "--admin")
    secrets = open_secrets()
    with opened(sqlite_url(own_home / "steelyard.db")) as database:
        ring = KeyRing(database, secrets.pepper)
        caller = asyncio.run(ring.identify(key["value"]))
        assert caller is not None
        assert (caller.project_id, caller.scopes) == (project["id"], {"inference"})
        administrator = asyncio.run(ring.identify(admin["value"]))
        assert administrator is not None
        assert administrator.project_id is None
    listed = run(capsys, "keys", "list", "-p", project["id"])["keys"]
    assert [one["id"] for one in listed] == [key["id"]]
    assert key["value"] not in json.dumps(listed)
    run(capsys, "keys", "delete", key["id"])
    assert run(capsys, "keys", "list", "-p", "search")["keys"] == []
    run(capsys, "keys", "delete", key["id"], code=10)
    run(capsys, "keys", "create", "x", "--scope", "nonsense", code=10)
    assert run(capsys, "projects", "archive", "other")["status"] == "archived"
    assert other["id"] not in [row["id"] for row in run(capsys, "projects", "list")["projects"]]
    run(capsys, "keys", "list", "-p", "nobody", code=2)


def test_money(capsys: pytest.CaptureFixture[str], own_home: Path, tmp_path: Path) -> None:
    project = run(capsys, "projects", "create", "search")
    run(capsys, "prices", "set", "*", "--input", "1")
    prices = run(capsys, "prices", "set", "tiny", "--input", "0.15", "--cached-input", "0.075", "--output", "0.6")
    nothing = {"training": 0, "storage": 0, "explanation": 0}
    assert prices["prices"]["tiny"] == {"input": 150, "cached_input": 75, "output": 600, **nothing}
    assert prices["prices"]["*"]["cached_input"] == 1000
    assert run(capsys, "prices", "show") == prices
    run(capsys, "prices", "set", "tiny", "--input", "0.0005", code=2)
    run(capsys, "budgets", "set", "2.5", "-p", "search")
    cost = spend(own_home, project["id"])
    assert cost == 800 * 150 + 200 * 75 + 500 * 600
    budget = run(capsys, "budgets", "show")["budgets"][0]
    assert (budget["limit"], budget["spent"]) == (2_500_000_000, cost)
    run(capsys, "budgets", "set", "none", "-p", "search")
    for wrong in ("much", "nan", "1e400"):
        run(capsys, "budgets", "set", wrong, code=2)
    (usage,) = run(capsys, "usage", "--by", "project_id,model")["usage"]
    assert (usage["requests"], usage["input_tokens"], usage["output_tokens"]) == (1, 1000, 500)
    assert (usage["project_id"], usage["cost"]) == (project["id"], cost)
    run(capsys, "usage", "--by", "color", code=2)
    run(capsys, "usage", "--month", "2026-13", code=2)
    made = run(capsys, "ledger", "invoice", MONTH, "-p", "search", "-o", str(tmp_path / "i.csv"))
    assert made["nano_dollars"] == cost
    rows = list(csv.DictReader((tmp_path / "i.csv").open()))
    assert rows[0]["output_tokens"] == "500"
    assert rows[-1]["dollars"] == f"0.{cost:09d}"
    run(capsys, "ledger", "invoice", MONTH, "-p", "search", "-o", str(tmp_path / "i.html"))
    assert f"0.{cost:09d}" in (tmp_path / "i.html").read_text()
    run(capsys, "ledger", "invoice", MONTH, "-o", str(tmp_path / "i.pdf"), code=2)


def test_a_ledger_that_was_touched_is_found_out(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    project = run(capsys, "projects", "create", "search")
    run(capsys, "prices", "set", "*", "--output", "1")
    spend(own_home, project["id"])
    assert run(capsys, "ledger", "verify") == {"entries": 2, "heads": 1, "wrong": []}
    with opened(sqlite_url(own_home / "steelyard.db")) as database:
        database.write_now(
            lambda connection: connection.execute(
                update(tables.ledger).where(tables.ledger.c.kind == "settle").values(cost=1)
            )
        )
    assert "was changed" in run(capsys, "ledger", "verify", code=5)["error"]["message"]
    run(capsys, "ledger", "verify", "--heads", str(own_home / "none"), code=2)
