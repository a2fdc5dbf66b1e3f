"""`steelyard import openai-jobs`: an export made again on a real server, once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command

sys.path.append(str(Path(__file__).parent.parent / "serve"))
from running_service import Service, serving

BASE = "gpt-4o-mini-2024-07-18"
GUIDE = Path(__file__).parent.parent.parent / "docs" / "migrate-from-openai.md"
MAPPING = ("--model", f"{BASE}=tiny")


def rows(count: int) -> str:
    messages = [[{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}] for n in range(count)]
    return "".join(json.dumps({"messages": one}) + "\n" for one in messages)


def job(number: int, **changes: Any) -> dict[str, Any]:
    """A job as OpenAI gives it."""
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8}
    return {
        "object": "fine_tuning.job",
        "id": f"ftjob-{number}",
        "model": BASE,
        "created_at": 1_700_000_000 + number,
        "fine_tuned_model": f"ft:{BASE}:acme:name-{number}:Ab{number}",
        "organization_id": "org-acme",
        "result_files": [],
        "status": "succeeded",
        "training_file": "file-shared",
        "validation_file": None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "trained_tokens": 5000,
        "seed": 40 + number,
        "error": None,
        "integrations": [],
        "user_provided_suffix": None,
        **changes,
    }


@pytest.fixture
def server(
    tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    """A server with the model `tiny`, in the environment."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    shutil.copytree(tiny_tokenizer_folder, folder)
    (folder / "config.json").write_text("{}")
    with serving(folder) as service:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.setenv("STEELYARD_API_KEY", service.key)
        yield service


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Two jobs that share a file, the newest first, as OpenAI lists them; one has a second file."""
    (tmp_path / "file-shared.jsonl").write_text(rows(8))
    (tmp_path / "file-held").write_text(rows(3))
    jobs = [job(2, validation_file="file-held", metadata={"team": "a"}), job(1, user_provided_suffix="Old name")]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"object": "list", "data": jobs, "has_more": False}))
    return path


def there(server: Service) -> list[Any]:
    """The jobs of the server, in the order of their making."""
    jobs = list(server.sdk().fine_tuning.jobs.list())
    return sorted(jobs, key=lambda one: one.metadata["openai_job"])


def write(path: Path, *jobs: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in jobs))
    return path


def test_an_export_is_made_again_once(command: Command, server: Service, export: Path) -> None:
    planned = command("import", "openai-jobs", export, *MAPPING, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert [one["state"] for one in planned.object["jobs"]] == ["to create", "to create"]
    assert not there(server)
    assert not list(server.sdk().files.list())

    done = command("import", "openai-jobs", export, *MAPPING, "--json")
    assert done.code == 0, done.err
    assert (done.object["created"], done.object["present"], done.object["refused"]) == (2, 0, 0)
    assert [one["openai_job"] for one in done.object["jobs"]] == ["ftjob-1", "ftjob-2"], "in their original order"
    first, second = there(server)
    assert [first.id, second.id] == [one["id"] for one in done.object["jobs"]]
    assert first.model == second.model == "tiny"
    assert first.metadata == {"openai_job": "ftjob-1"}
    assert second.metadata == {"team": "a", "openai_job": "ftjob-2"}
    assert (first.seed, second.seed) == (41, 42)
    assert (first.user_provided_suffix, second.user_provided_suffix) == ("Old name", "name-2")
    assert second.method.supervised.hyperparameters.n_epochs == 2
    assert second.method.supervised.hyperparameters.batch_size == 4
    assert second.method.supervised.hyperparameters.learning_rate_multiplier == 1.8
    assert first.training_file == second.training_file
    files = {file.id: file for file in server.sdk().files.list()}
    assert {file.filename for file in files.values()} == {"file-shared.jsonl", "file-held"}
    assert len(files) == 2
    assert server.sdk().files.content(second.validation_file).read() == rows(3).encode()

    again = command("import", "openai-jobs", export, "--json")
    assert again.code == 0, again.err
    assert (again.object["created"], again.object["present"]) == (0, 2)
    assert [one["id"] for one in again.object["jobs"]] == [first.id, second.id]
    assert len(there(server)) == 2
    assert len(list(server.sdk().files.list())) == 2


def test_the_guides_export_can_be_imported(
    command: Command, server: Service, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("import", "openai-jobs", export, *MAPPING).code == 0
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    snippet = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True, timeout=60)
    made = tmp_path / "export"
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["jobs.jsonl", "files.jsonl", *(f"{file.id}.jsonl" for file in server.sdk().files.list())]
    )
    (made / "jobs.jsonl").write_text((made / "jobs.jsonl").read_text().replace('"failed"', '"succeeded"'))
    done = command("import", "openai-jobs", made / "jobs.jsonl", "--json")
    assert done.code == 0, done.err
    assert done.object["created"] == 2


def test_a_later_export_uses_the_files_that_are_there(command: Command, server: Service, export: Path) -> None:
    assert command("import", "openai-jobs", export, *MAPPING).code == 0
    shared = there(server)[0].training_file
    later = write(export.with_name("jobs.jsonl"), job(1), job(2), job(3))
    assert command("import", "openai-jobs", later, *MAPPING).code == 0
    assert there(server)[2].training_file == shared
    (export.parent / "file-shared.jsonl").write_text(rows(9))  # another content is another file
    later = write(later, job(1), job(4))
    assert command("import", "openai-jobs", later, *MAPPING).code == 0
    changed = there(server)[3].training_file
    assert changed != shared
    server.sdk().files.delete(changed)  # and what was deleted is sent again, whatever an Idempotency-Key has kept
    later = write(later, job(1, id="ftjob-5"))
    assert command("import", "openai-jobs", later, *MAPPING).code == 0
    assert there(server)[4].training_file not in (shared, changed)


def test_files_are_found_by_the_names_that_they_had(command: Command, server: Service, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "pets.jsonl").write_text(rows(4))
    listing = {"id": "file-shared", "filename": "pets.jsonl", "bytes": len(rows(4))}
    (folder / "files.jsonl").write_text(json.dumps(listing) + "\n")
    export = write(tmp_path / "jobs.jsonl", job(1))
    assert command("import", "openai-jobs", export, "--files", folder, *MAPPING).code == 0
    (file,) = server.sdk().files.list()
    assert file.filename == "pets.jsonl"
    (folder / "files.jsonl").write_text(json.dumps(listing | {"bytes": 1}) + "\n")  # another file of that name
    export = write(tmp_path / "jobs.jsonl", job(2))
    done = command("import", "openai-jobs", export, "--files", folder, *MAPPING)
    assert "file-shared.jsonl: there is no such file" in done.complaint(3)
    (folder / "files.jsonl").write_text('{"id": 1}\n')
    done = command("import", "openai-jobs", export, "--files", folder, *MAPPING)
    assert "files.jsonl:1: no file object" in done.complaint(3)


def test_what_cannot_be_imported_is_said_and_the_rest_goes_on(command: Command, server: Service, export: Path) -> None:
    jobs = [
        job(1),
        job(2, model="ft:gpt-4o-mini-2024-07-18:acme::Xy", training_file="file-gone"),
        job(3, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}, hyperparameters=None),
        job(4, method={"type": "reinforcement"}),
        job(5, integrations=[{"type": "wandb", "wandb": {"project": "x"}}]),
        job(6, method=None, hyperparameters={"n_epochs": 4, "batch_size": None, "prompt_loss_weight": 0.1}),
        job(7, user_provided_suffix="a/b"),
        job(8, metadata={f"k{number}": "v" for number in range(16)}),
        job(9, status="failed", fine_tuned_model=None, training_file="file-gone"),
        job(10, method=None, hyperparameters={"n_epochs": 4, "batch_size": "auto"}, fine_tuned_model=None, seed=None),
    ]
    done = command("import", "openai-jobs", write(export, *jobs), *MAPPING, "--json")
    assert done.code == 10
    found = {one["openai_job"]: one for one in done.object["jobs"]}
    reasons = {
        "ftjob-2": "fine-tuned model",
        "ftjob-3": "dpo",
        "ftjob-4": "reinforcement",
        "ftjob-5": "wandb",
        "ftjob-6": "prompt_loss_weight",
        "ftjob-7": "suffix",
        "ftjob-8": "metadata",
    }
    for name, reason in reasons.items():
        assert found[name]["state"] == "refused", name
        assert reason in found[name]["reason"]
    assert found["ftjob-9"]["state"] == "left out"
    assert "failed at OpenAI" in found["ftjob-9"]["reason"]
    assert done.object["refused"] == len(reasons)
    assert [one.metadata["openai_job"] for one in there(server)] == ["ftjob-1", "ftjob-10"]
    last = there(server)[1]
    assert last.user_provided_suffix is None
    shown = command("import", "openai-jobs", export, *MAPPING)
    assert shown.code == 10
    assert "ftjob-3" in shown.out
    assert "wandb" in shown.out


def test_what_the_server_refuses_is_said(command: Command, server: Service, export: Path) -> None:
    config = server.checkpoint / "config.json"
    config.write_text('{"quantization_config": {}}')  # a compressed model is not trainable
    done = command("import", "openai-jobs", export, *MAPPING, "--json")
    assert done.code == 10
    assert {one["state"] for one in done.object["jobs"]} == {"refused"}
    assert "compressed" in done.object["jobs"][0]["reason"]
    config.write_text("{}")
    done = command("import", "openai-jobs", export, *MAPPING, "--json")  # the refusal that was kept is asked anew
    assert done.code == 0, done.err
    assert done.object["created"] == 2
    assert len(list(server.sdk().files.list())) == 2, "sent once"


def test_every_problem_is_named_before_anything_is_changed(command: Command, server: Service, export: Path) -> None:
    folder = export.parent
    lines = rows(3).splitlines()
    lines[1] = '{"messages": [{"role": "robot", "content": "x"}]}'
    (folder / "file-shared.jsonl").write_text("\n".join([*lines, "{not json"]) + "\n")
    jobs = [job(1), job(2, validation_file="file-none"), job(3, training_file="../file-held"), job(4)]
    done = command("import", "openai-jobs", write(export, *jobs), *MAPPING)
    said = done.complaint(3)
    assert "nothing was changed" in said
    assert "file-shared.jsonl:2: field 'messages[0].role'" in said
    assert "file-shared.jsonl:4: not JSON" in said
    assert "file-none.jsonl: there is no such file, and one job" in said
    assert "../file-held.jsonl: there is no such file" in said, "nothing outside of the folder"
    (folder / "file-shared.jsonl").write_text("\n")
    assert "no rows" in command("import", "openai-jobs", write(export, job(1)), *MAPPING).complaint(3)
    assert not there(server)
    assert not list(server.sdk().files.list())


def test_models_that_are_needed_are_named(command: Command, server: Service, export: Path) -> None:
    said = command("import", "openai-jobs", export).complaint(2)
    assert f"--model {BASE}=MODEL" in said
    assert "served here: tiny" in said
    said = command("import", "openai-jobs", export, "--model", f"{BASE}=large").complaint(2)
    assert "large" in said
    assert "tiny" in said
    assert "FROM=TO" in command("import", "openai-jobs", export, "--model", BASE).complaint(2)
    same = write(export, job(1, model="tiny"))  # a served model stands for itself
    assert command("import", "openai-jobs", same).code == 0
    assert [one.model for one in there(server)] == ["tiny"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no jobs"),
        ("[]", "no jobs"),
        ('{"data": []}', "no jobs"),
        ("[1]", r"field '[0]': a job object is needed, not a number"),
        ('{"data": [{"id": "x"}]}', "field 'data[0]': no fine-tuning job"),
        ('{"id": "ftjob-1", "model": "m", "training_file": "f", "seed": "x"}', "$.seed"),
        ('{"id": "ftjob-1", "model": "m", "training_file": "f"}\n{oops\n', ":2: not JSON"),
        ('"x"', "a job object is needed, not a string"),
    ],
)
def test_a_file_that_is_no_export(command: Command, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "jobs.json").write_text(content)
    assert said in command("import", "openai-jobs", tmp_path / "jobs.json", "--api-key", "x").complaint(3)


def test_a_page_that_is_not_the_last(command: Command, server: Service, export: Path) -> None:
    export.write_text(json.dumps({"data": [job(1)], "has_more": True}))
    done = command("import", "openai-jobs", export, *MAPPING, "--dry-run", "--json")
    assert done.object["more"] is True
    assert "has_more" in done.err
    pages = [{"data": [job(2)], "has_more": True}, {"data": [job(1), job(2)], "has_more": False}]
    done = command("import", "openai-jobs", write(export, *pages), *MAPPING, "--dry-run", "--json")
    assert done.object["more"] is False
    assert [one["openai_job"] for one in done.object["jobs"]] == ["ftjob-1", "ftjob-2"]


def test_a_server_that_is_not_one(
    command: Command, server: Service, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(code: int, *options: str) -> str:
        return command("import", "openai-jobs", export, *MAPPING, *options).complaint(code)

    assert "does the server run there?" in complaint(4, "--base-url", "http://127.0.0.1:9/v1")
    assert "ends in /v1" in complaint(4, "--base-url", server.url)
    assert "no URL" in complaint(2, "--base-url", "127.0.0.1:8000")
    assert "OpenAI itself" in complaint(2, "--base-url", "https://api.openai.com/v1")
    assert "key" in complaint(10, "--api-key", "sk-sy-nobody")
    assert "key" in complaint(10, "--api-key", server.admin_key)
    assert "no key has" in complaint(2, "--api-key", "schlüssel")
    assert "no such folder" in complaint(3, "--files", str(export.parent / "none"))
    monkeypatch.delenv("STEELYARD_API_KEY")
    assert "OPENAI_API_KEY" in complaint(2)
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    assert command("import", "openai-jobs", export, *MAPPING, "--dry-run").code == 0
