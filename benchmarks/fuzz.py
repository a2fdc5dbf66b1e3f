"""Thousands of requests that schemathesis makes up from the server's own OpenAPI document, right ones and wrong ones.

    python benchmarks/fuzz.py --json fuzz.json

Its own server, in a temporary folder, over the engine without a model that the tests have. Every answer must have a
status, a content type and a body that the document knows, none may be a 5xx, and what the document forbids must be
refused. Ids that earlier answers gave stand in most paths, so that the requests meet things that exist.

Target: nothing found.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
import tokenizers
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Ok
from tokenizers import decoders, models, pre_tokenizers

from gateway import free_port, postgres, process, wait_ready
from steelyard.app import run
from steelyard.serve.auth import ADMIN_SCOPES, ADMIN_VARIABLE, KEY_VARIABLE
from steelyard.serve.keys import new_key
from steelyard.store.database import sqlite_url

ENGINE = Path(__file__).parent.parent / "tests" / "serve" / "stand_in_engine.py"
MODEL = "tiny"
CASES, QUICK = 10_000, 300
VISIT, QUICK_VISIT = 15, 4
"""Cases of each kind before the next operation has its turn."""
ANSWER_SECONDS = 30
KNOWN_SHARE, THIN_SHARE, NUL_SHARE = 0.8, 0.7, 0.02
MOST_OPTIONAL, REMEMBERED = 4, 8
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
PARAMETER = re.compile(r"\{(\w+)\}")
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": "x"}}
ENDLESS = (("stream", True), ("stream", "true"))
"""Of a job's events: it would last as long as the job."""
ADAPTER = "worn"
VALUES = {"model": MODEL, "lora_name": ADAPTER, "lora_path": ADAPTER, "base_model_name": MODEL}
"""What fields of bodies are mostly set to, so that they name what exists."""
FILES = {"training_file": "fine-tune", "validation_file": "fine-tune", "input_file_id": "batch"}
"""What the files that bodies name are for."""
CONTENTS = {"fine-tune": json.dumps(ROW), "batch": json.dumps(LINE), "user_data": "anything"}


@dataclass
class Found:
    """What came of an operation's cases."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many were sent."""
        return self.statuses.total()


@dataclass
class Known:
    """What exists on the server: the path parameters of things, by the path that has them."""

    url: str
    headers: Mapping[str, Mapping[str, str]]
    """By the kind of key."""
    luck: random.Random
    things: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """By what they are for."""

    def furnish(self) -> None:
        """Make a file of every kind, and a project to change that is not the key's own."""
        with httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS) as http:
            for purpose, content in CONTENTS.items():
                upload = {"files": {"file": ("x.jsonl", content)}, "data": {"purpose": purpose}}
                made = http.post("/v1/files", headers=self.headers["project"], **upload)  # type: ignore[arg-type]
                self.files[purpose] = made.json()["id"]
            made = http.post("/v1/organization/projects", headers=self.headers["admin"], json={"name": "fuzzed"})
            self.things["/v1/organization/projects/{project_id}"] = [{"project_id": made.json()["id"]}]

    def path(self, template: str) -> dict[str, str] | None:
        """Parameters for a path, of things that exist."""
        names = PARAMETER.findall(template)
        fixed = {"limit_id": f"rl-{MODEL}", "model_id": MODEL, "kind": "completions"}
        for end in range(len(names), 0, -1):
            place = template[: template.index(f"{{{names[end - 1]}}}") + len(names[end - 1]) + 2]
            rest = names[end:]
            if self.things.get(place) and all(name in fixed for name in rest):
                return {**self.luck.choice(self.things[place][-REMEMBERED:]), **{name: fixed[name] for name in rest}}
        return {name: fixed[name] for name in names} if names and all(name in fixed for name in names) else None

    def learn(self, case: Case[Any], status: int, body: Any) -> None:
        """Remember what was made, forget what is gone."""
        if status != 200 or not isinstance(body, dict):
            return
        template, own = case.operation.path, dict(case.path_parameters or {})
        if case.method.upper() == "DELETE" or template.endswith("/archive"):
            place = template.removesuffix("/archive")
            self.things[place] = [thing for thing in self.things.get(place, []) if thing != own]
        elif case.method.upper() == "POST" and isinstance(body.get("id"), str):
            for path in case.operation.schema.raw_schema["paths"]:
                if item := re.fullmatch(re.escape(template) + r"/\{(\w+)\}", path):
                    self.things.setdefault(path, []).append({**own, item[1]: body["id"]})

    def settle(self, case: Case[Any]) -> None:
        """Let a case meet things that exist, and end soon. What was made wrong on purpose stays wrong."""
        if "Idempotency-Key" in (case.headers or {}) and _right(case, ParameterLocation.HEADER):
            case.headers["Idempotency-Key"] = secrets.token_hex(8)  # else cases would get each other's answers
        known = self.path(case.operation.path)
        if known is not None and _right(case, ParameterLocation.PATH) and self.luck.random() < KNOWN_SHARE:
            case.path_parameters = {**case.path_parameters, **known}
        if case.query and case.operation.path.endswith("/events"):
            case.query = {name: value for name, value in case.query.items() if (name, value) not in ENDLESS}
        if case.path_parameters and self.luck.random() < NUL_SHARE:  # what databases like least
            case.path_parameters = {name: f"{value}%00" for name, value in case.path_parameters.items()}
        if case.query and self.luck.random() < NUL_SHARE:
            case.query = {name: f"{value}\0" for name, value in case.query.items()}
        if not isinstance(case.body, dict) or case.media_type != "application/json":
            return
        body: dict[str, Any] = case.body
        if _right(case, ParameterLocation.BODY):
            self._thin(case, body)
        if isinstance(body.get("seed"), int) and body["seed"] >= 0:  # a wrong one stays wrong
            body["seed"] = 0  # to the engine the milliseconds that a token takes
        for name, value in body.items():
            if isinstance(value, str) and self.luck.random() < KNOWN_SHARE:
                body[name] = self.files[FILES[name]] if name in FILES else VALUES.get(name, value)
            elif isinstance(value, str) and self.luck.random() < NUL_SHARE:
                body[name] = f"{value}\0"

    def _thin(self, case: Case[Any], body: dict[str, Any]) -> None:
        """Leave few optional fields: many at once mostly contradict each other."""
        content = case.operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]
        name = content["$ref"].rpartition("/")[2]
        required = case.operation.schema.raw_schema["components"]["schemas"][name].get("required", [])
        optional = [name for name in body if name not in required]
        if self.luck.random() < THIN_SHARE:
            for name in self.luck.sample(optional, max(0, len(optional) - MOST_OPTIONAL)):
                del body[name]


def _right(case: Case[Any], place: ParameterLocation) -> bool:
    """Whether this part of a case is as the document has it."""
    part = None if case.meta is None else case.meta.components.get(place)
    return part is not None and part.mode is GenerationMode.POSITIVE


def fuzz(url: str, key: str, admin_key: str, cases: int, visit: int = VISIT) -> dict[str, Found]:
    """Send `cases` requests to a server, and those that complete a round; what came of them, by operation."""
    headers = {name: {"authorization": f"Bearer {value}"} for name, value in (("project", key), ("admin", admin_key))}
    document = httpx.get(f"{url}/openapi.json").json()
    admin = {
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if operation.pop("security", None) in [[{"key": [scope]}] for scope in ADMIN_SCOPES]
    }
    # Without `security`, since every case has its key: a missing one is not what is made wrong here.
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    # What makes things comes first, then what removes them; projects go last.
    operations.sort(
        key=lambda one: (one.path.endswith("/archive"), ["post", "get", "delete"].index(one.method.lower()))
    )
    found = {operation.label: Found() for operation in operations}
    known = Known(url, headers, random.Random(0))
    known.furnish()
    load_all_checks()
    with requests.Session() as session:
        for number in itertools.count():
            if sum(one.cases for one in found.values()) >= cases:
                break
            for operation in operations:
                used = headers["admin" if operation.label in admin else "project"]
                send = functools.partial(_send, url, session, used, known, found[operation.label])
                _generate(operation, GenerationMode.POSITIVE, visit, number, send)
                if operation.query or operation.headers or operation.body:  # else nothing can be wrong
                    _generate(operation, GenerationMode.NEGATIVE, visit, number, send)
    return found


def _generate(
    operation: APIOperation[Any, Any, Any, Any],
    mode: GenerationMode,
    count: int,
    number: int,
    send: Callable[[Case[Any]], None],
) -> None:
    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def every(case: Case[Any]) -> None:
        send(case)

    every()


def _send(
    url: str, session: requests.Session, headers: Mapping[str, str], known: Known, found: Found, case: Case[Any]
) -> None:
    known.settle(case)
    try:
        answer = case.call(base_url=url, session=session, headers=dict(headers), timeout=ANSWER_SECONDS)
    except (requests.RequestException, OSError) as error:
        found.statuses[0] += 1
        found.wrong.append(f"no answer: {error!r} to {case!r}"[:2000])
        return
    found.statuses[answer.status_code] += 1
    body = None
    with contextlib.suppress(ValueError):
        body = json.loads(answer.content)
    known.learn(case, answer.status_code, body)
    checks: Any = CHECKS.get_by_names(list(CHECKED))
    try:
        case.validate_response(answer, checks=checks, headers=dict(headers))
    except FailureGroup as group:
        said = "; ".join(f"{failure.title}: {failure.message}" for failure in group.exceptions)
        found.wrong.append(f"{said} | {case!r} | {answer.status_code} {answer.content[:300]!r}"[:2000])


def stand_in(checkpoint: Path, model: str, adapters: Mapping[str, Path], descriptor: int) -> list[str]:
    """The command line of the engine without a model."""
    return [sys.executable, str(ENGINE), str(checkpoint), "--model", model, "--socket", str(descriptor)]


def make_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint: a tokenizer of bytes, a chat template, no weights."""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    return folder


def make_adapter(folder: Path) -> None:
    """A folder that holds what looks like an adapter."""
    (folder / ADAPTER).mkdir(parents=True)
    (folder / ADAPTER / "adapter_config.json").write_text("{}")


@contextlib.contextmanager
def server(folder: Path, database: str) -> Iterator[tuple[str, str, str]]:
    """A server of its own: its URL, a project's key, an administrators' key."""
    key, admin_key, port = new_key(), new_key(), free_port()
    environment = {KEY_VARIABLE: key, ADMIN_VARIABLE: admin_key, "STEELYARD_HOME": str(folder / "home")}
    command = [sys.executable, __file__, "--serve", make_checkpoint(folder / MODEL), port, database]
    with process(command, port, folder / "server.log", **environment) as url:
        wait_ready(url)
        yield url.removesuffix("/v1"), key, admin_key


def main() -> None:
    """Fuzz, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=3, metavar=("CHECKPOINT", "PORT", "DATABASE"), help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, default=CASES, metavar="N")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} cases")
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL of its own rather than SQLite")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.serve:
        folder = Path(os.environ["STEELYARD_HOME"]) / "adapters"
        make_adapter(folder)
        checkpoint, port, database = options.serve
        run(
            [Path(checkpoint)],
            port=int(port),
            adapter_folder=folder,
            database=database,
            command=stand_in,
            job_threads=1,
        )
        return
    cases, visit = (QUICK, QUICK_VISIT) if options.quick else (options.cases, VISIT)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        theirs = stack.enter_context(postgres(Path(name))) if options.postgresql else None
        assert theirs or not options.postgresql, "PostgreSQL is not installed here"
        with server(Path(name), theirs or sqlite_url(Path(name) / "steelyard.db")) as (url, key, admin_key):
            found = fuzz(url, key, admin_key, cases, visit)
        log = (Path(name) / "server.log").read_text()
    print(f"{'operation':76}{'cases':>7}{'2xx':>7}{'4xx':>7}{'5xx':>5}{'wrong':>7}")
    for label, one in found.items():
        good, refused, failed = (
            sum(one.statuses[n] for n in range(100 * digit, 100 * digit + 100)) for digit in (2, 4, 5)
        )
        print(f"{label:76}{one.cases:7}{good:7}{refused:7}{failed:5}{len(one.wrong):7}")
    short = [
        {"name": label, "measured": wrong, "target": "as the document says"}
        for label, one in found.items()
        for wrong in one.wrong
    ]
    for item in short[:50]:
        print(f"{item['name']}: {item['measured']}")
    faults = [line for line in log.splitlines() if "Error" in line or " failed" in line]
    total = sum(one.cases for one in found.values())
    print(f"{total} cases, {len(short)} found; errors in the server's log: {len(faults)}")
    if options.json:
        operations = {
            label: {"cases": one.cases, "statuses": dict(one.statuses), "wrong": len(one.wrong)}
            for label, one in found.items()
        }
        options.json.write_text(json.dumps({"operations": operations, "log": faults, "short": short}, indent=1))


if __name__ == "__main__":
    main()
