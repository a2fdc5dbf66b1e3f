"""Projects, keys, limits, usage, costs: by the SDK's administration client, whose types check every response."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_service import Service, eventually, serving

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PRICES = {"*": {"input": 150, "cached_input": 75, "output": 600}, "tiny": {"input": 1000, "output": 2000}}


@pytest.fixture(scope="module")
def priced(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_checkpoint("tiny")) as service, service.admin_http() as http:
        answer = http.post("/v1/organization/prices", json={"prices": PRICES})
        assert answer.json()["version"] == 1
        yield service


@pytest.fixture
def admin(priced: Service) -> openai.OpenAI:
    return priced.admin(_strict_response_validation=True)


def new_project(admin: openai.OpenAI, name: str = "team") -> tuple[str, str]:
    project = admin.admin.organization.projects.create(name=name)
    account = admin.admin.organization.projects.service_accounts.create(project.id, name="app")
    assert account.api_key is not None
    return project.id, account.api_key.value


def ask(service: Service, key: str, max_tokens: int = 4, **options: Any) -> Any:
    client = service.sdk(api_key=key)
    return client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=max_tokens, **options)


def balance(service: Service, project: str) -> tuple[int, int]:
    """The sum of a project's entries, and of their costs."""
    with service.admin_http() as http:
        page = http.get("/v1/organization/ledger", params={"project_id": project, "limit": 1000}).json()
    return sum(entry["amount"] for entry in page["data"]), sum(entry["cost"] for entry in page["data"])


def test_projects(admin: openai.OpenAI) -> None:
    projects = admin.admin.organization.projects
    made = projects.create(name="  first  ")
    assert (made.name, made.status, made.archived_at) == ("first", "active", None)
    assert projects.retrieve(made.id) == made
    assert projects.update(made.id, name="renamed").name == "renamed"
    ids = [project.id for project in projects.list(limit=1)]
    assert made.id in ids
    assert len(ids) == len(set(ids)) >= 2, "pages follow each other"
    archived = projects.archive(made.id)
    assert archived.status == "archived"
    assert archived.archived_at is not None
    assert made.id not in [project.id for project in projects.list()]
    assert made.id in [project.id for project in projects.list(include_archived=True)]
    with pytest.raises(openai.ConflictError):
        projects.update(made.id, name="again")
    with pytest.raises(openai.NotFoundError):
        projects.retrieve("proj_nothing")
    for name in ("", " ", "x" * 300, "a\nb"):
        with pytest.raises(openai.BadRequestError) as error:
            projects.create(name=name)
        assert error.value.param == "name"


def test_a_key_works_until_it_is_taken_back(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    keys = admin.admin.organization.projects.api_keys
    assert ask(priced, value).usage.completion_tokens == 4
    (listed,) = keys.list(project)
    for access, ids in (("active", [listed.id]), ("any", [listed.id]), ("inactive", [])):
        assert [key.id for key in keys.list(project, owner_project_access=access)] == ids  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="owner_project_access"):
        keys.list(project, owner_project_access="both")  # type: ignore[arg-type]
    assert listed.redacted_value.startswith(value[:9])
    assert value not in listed.to_json()
    assert listed.owner.type == "service_account"
    assert eventually(lambda: keys.retrieve(listed.id, project_id=project).last_used_at)
    keys.delete(listed.id, project_id=project)
    with pytest.raises(openai.AuthenticationError):
        ask(priced, value)
    with pytest.raises(openai.NotFoundError):
        keys.retrieve(listed.id, project_id=project)


def test_service_accounts(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    accounts = admin.admin.organization.projects.service_accounts
    (account,) = accounts.list(project)
    assert accounts.retrieve(account.id, project_id=project) == account
    bare = accounts.create(project, name="bare", create_service_account_only=True)
    assert bare.api_key is None
    accounts.delete(account.id, project_id=project)
    with pytest.raises(openai.AuthenticationError):
        ask(priced, value)
    other, _ = new_project(admin)
    with pytest.raises(openai.NotFoundError):
        accounts.retrieve(bare.id, project_id=other)


def test_an_archived_projects_keys_stop_working(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    ask(priced, value)
    admin.admin.organization.projects.archive(project)
    with pytest.raises(openai.AuthenticationError):
        ask(priced, value)


def test_a_key_with_few_scopes_and_an_end(priced: Service, admin: openai.OpenAI) -> None:
    project, _ = new_project(admin)
    with priced.admin_http() as http:
        made = http.post(
            f"/v1/organization/projects/{project}/api_keys",
            json={"name": "files only", "scopes": ["files"], "expires_in_seconds": 3600},
        ).json()
        assert made["scopes"] == ["files"]
        assert made["expires_at"] == pytest.approx(time.time() + 3600, abs=10)
        with pytest.raises(openai.PermissionDeniedError, match="inference"):
            ask(priced, made["value"])
        short = http.post(
            f"/v1/organization/projects/{project}/api_keys", json={"name": "x", "expires_in_seconds": 1}
        ).json()
        for scopes in ([], ["admin.read"], ["nonsense"]):
            answer = http.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "x", "scopes": scopes})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "scopes")
    time.sleep(4)
    with pytest.raises(openai.AuthenticationError):
        ask(priced, short["value"])


def test_admin_keys(priced: Service, admin: openai.OpenAI) -> None:
    keys = admin.admin.organization.admin_api_keys
    made = keys.create(name="second")
    second = priced.admin(admin_api_key=made.value, _strict_response_validation=True)
    assert made.id in [key.id for key in second.admin.organization.admin_api_keys.list()]
    assert keys.retrieve(made.id).redacted_value == made.redacted_value
    with pytest.raises(openai.ConflictError):
        second.admin.organization.admin_api_keys.delete(made.id)
    keys.delete(made.id)
    with pytest.raises(openai.AuthenticationError):
        list(second.admin.organization.projects.list())


def test_an_admin_key_never_asks_a_model_and_a_projects_key_never_administers(priced: Service) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        ask(priced, priced.admin_key)
    with pytest.raises(openai.PermissionDeniedError):
        list(priced.admin(admin_api_key=priced.key).admin.organization.projects.list())


def test_rate_limits(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    limits = admin.admin.organization.projects.rate_limits
    (limit,) = limits.list_rate_limits(project)
    assert limit.model == "tiny"
    changed = limits.update_rate_limit(
        limit.id, project_id=project, max_requests_per_1_minute=3, max_tokens_per_1_minute=1000
    )
    assert changed.max_requests_per_1_minute == 3
    client = priced.sdk(api_key=value)
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=4)
    assert raw.headers["x-ratelimit-limit-requests"] == "3"
    assert raw.headers["x-ratelimit-remaining-requests"] == "2"
    assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    with pytest.raises(openai.RateLimitError, match="tokens a minute"):
        ask(priced, value, max_tokens=200, n=8)
    ask(priced, value)
    with pytest.raises(openai.RateLimitError) as error:
        ask(priced, value)
    assert error.value.code == "rate_limit_exceeded"
    assert 1 <= int(error.value.response.headers["retry-after"]) <= 20
    assert error.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    with priced.admin_http() as http:
        http.post(
            f"/v1/organization/projects/{project}/rate_limits/{limit.id}",
            json={"max_requests_per_1_minute": 1000, "max_concurrent_requests": 1},
        ).raise_for_status()
    stream = ask(priced, value, max_tokens=100, stream=True, seed=50)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="at once"):
        ask(priced, value)
    stream.close()
    assert eventually(lambda: ask_or_none(priced, value))


def ask_or_none(service: Service, key: str) -> Any:
    try:
        return ask(service, key)
    except openai.RateLimitError:
        return None


def test_spend_limits(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    limit = admin.admin.organization.projects.spend_limit
    with pytest.raises(openai.NotFoundError):
        limit.retrieve(project)
    assert limit.update(project, threshold_amount=0, currency="USD", interval="month").enforcement.status == "enforcing"
    with pytest.raises(openai.RateLimitError) as error:
        ask(priced, value)
    assert error.value.code == "insufficient_quota"
    assert error.value.type == "insufficient_quota"
    assert balance(priced, project) == (0, 0)
    assert limit.update(project, threshold_amount=5, currency="USD", interval="month").threshold_amount == 5
    assert limit.retrieve(project).enforcement.status == "inactive"
    ask(priced, value)
    assert limit.delete(project).deleted
    ask(priced, value, max_tokens=200)


def test_spend_alerts(priced: Service, admin: openai.OpenAI) -> None:
    project, _ = new_project(admin)
    alerts = admin.admin.organization.projects.spend_alerts
    channel: Any = {"type": "email", "recipients": ["a@example.org"], "subject_prefix": "[x]"}
    made = alerts.create(project, threshold_amount=10, currency="USD", interval="month", notification_channel=channel)
    assert made.notification_channel.recipients == ["a@example.org"]
    changed = alerts.update(
        made.id, project_id=project, threshold_amount=20, currency="USD", interval="month", notification_channel=channel
    )
    assert changed.threshold_amount == 20
    assert [alert.id for alert in alerts.list(project)] == [made.id]
    assert alerts.delete(made.id, project_id=project).deleted
    assert list(alerts.list(project)) == []


def test_usage_and_costs_are_the_ledgers(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin)
    answers = [ask(priced, value, max_tokens=size) for size in (3, 5, 8)]
    prompt = answers[0].usage.prompt_tokens
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    cost = 3 * prompt * 1000 + tokens * 2000
    assert sum(answer.usage.cost for answer in answers) == pytest.approx(cost / 1e9)
    assert balance(priced, project) == (cost, cost)
    begin = int(time.time()) - 3600
    usage = admin.admin.organization.usage.completions(
        start_time=begin, bucket_width="1h", project_ids=[project], group_by=["model", "project_id", "api_key_id"]
    )
    results = [result for bucket in usage.data for result in bucket.results]
    assert len(results) == 1
    found: Any = results[0]
    assert (found.input_tokens, found.output_tokens, found.num_model_requests) == (3 * prompt, tokens, 3)
    assert (found.model, found.project_id) == ("tiny", project)
    assert found.api_key_id.startswith("key_")
    costs = admin.admin.organization.usage.costs(
        start_time=begin - begin % 86400, project_ids=[project], group_by=["line_item"]
    )
    spent: list[Any] = [result for bucket in costs.data for result in bucket.results]
    assert [(one.line_item, one.amount.value) for one in spent] == [("completions", pytest.approx(cost / 1e9))]
    embeddings = admin.admin.organization.usage.embeddings(start_time=begin, project_ids=[project])
    assert [bucket.results for bucket in embeddings.data] == [[]] * len(embeddings.data)


def test_usage_in_pages(priced: Service, admin: openai.OpenAI) -> None:
    begin = 1_700_000_000
    page = admin.admin.organization.usage.completions(
        start_time=begin, end_time=begin + 3 * 86400, bucket_width="1d", limit=2
    )
    assert page.has_more
    assert page.next_page is not None
    rest = admin.admin.organization.usage.completions(
        start_time=begin, end_time=begin + 3 * 86400, bucket_width="1d", limit=2, page=page.next_page
    )
    starts = [bucket.start_time for bucket in [*page.data, *rest.data]]
    assert starts == sorted(set(starts))
    assert starts[0] <= begin < starts[0] + 86400
    assert starts[-1] < begin + 3 * 86400 <= starts[-1] + 86400
    assert not rest.has_more
    for wrong in ({"bucket_width": "2d"}, {"limit": 1000}, {"group_by": ["color"]}, {"user_ids": ["x"]}):
        with pytest.raises(openai.BadRequestError):
            admin.admin.organization.usage.completions(start_time=begin, **wrong)
    with priced.admin_http() as http:
        for name in ("start_time", "end_time", "bucket_width", "limit", "page", "batch"):
            answer = http.get(f"/v1/organization/usage/completions?start_time=1&{name}=1&{name}=2")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_the_audit_log_names_who_changed_what(admin: openai.OpenAI) -> None:
    project, _ = new_project(admin, "audited")
    logs: list[Any] = list(admin.admin.organization.audit_logs.list(limit=10).data)
    kinds = [log.type for log in logs[:3]]
    assert kinds == ["api_key.created", "service_account.created", "project.created"]
    assert all(log.actor.api_key.id == "key_environment_admin" for log in logs[:3])
    assert all(log.project.id == project for log in logs[:3])


def test_prices_are_checked_and_versions_follow(priced: Service) -> None:
    with priced.admin_http() as http:
        for wrong in ({}, {"prices": {}}, {"prices": {"x": {"input": -1}}}, {"prices": {"x": {"inputs": 1}}}):
            assert http.post("/v1/organization/prices", json=wrong).status_code == 400
        answer: httpx.Response = http.get("/v1/organization/prices")
        assert answer.json()["prices"]["tiny"]["output"] == 2000


def test_a_receipt_can_be_looked_up(priced: Service, admin: openai.OpenAI) -> None:
    _, value = new_project(admin)
    answer = ask(priced, value)
    with priced.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": answer.id}).json()["data"]
    assert [entry["kind"] for entry in entries] == ["settle", "reserve"]
    assert entries[0]["output_tokens"] == answer.usage.completion_tokens
    assert entries[0]["cost"] == pytest.approx(answer.usage.cost * 1e9)
    assert entries[0]["amount"] + entries[1]["amount"] == entries[0]["cost"]


def test_an_alert_sounds_once_a_month(priced: Service, admin: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    project, value = new_project(admin, "alarmed")
    channel: Any = {"type": "email", "recipients": ["boss@example.org"]}
    admin.admin.organization.projects.spend_alerts.create(
        project, threshold_amount=0, currency="USD", interval="month", notification_channel=channel
    )
    ask(priced, value)
    eventually(lambda: "boss@example.org" in caplog.text, 10)
    time.sleep(2.5)
    assert caplog.text.count("'alarmed'") == 1


def test_what_is_stored_is_charged_once_a_day(priced: Service, admin: openai.OpenAI) -> None:
    project, value = new_project(admin, "storing")
    size = 200_000
    with priced.admin_http() as http:
        dear = {**PRICES, "*": {**PRICES["*"], "storage": 1_000_000}}
        http.post("/v1/organization/prices", json={"prices": dear}).raise_for_status()
        priced.sdk(api_key=value).files.create(file=("x", b"x" * size), purpose="user_data")
        expected = size * 1_000_000 // 1_000_000_000
        eventually(lambda: balance(priced, project) == (expected, expected), 10)
        time.sleep(2.5)
        assert balance(priced, project) == (expected, expected)
        http.post("/v1/organization/prices", json={"prices": PRICES}).raise_for_status()
    costs = admin.admin.organization.usage.costs(
        start_time=int(time.time()) // 86400 * 86400, project_ids=[project], group_by=["line_item"]
    )
    lines: list[Any] = [result.line_item for bucket in costs.data for result in bucket.results]
    assert lines == ["storage"]
