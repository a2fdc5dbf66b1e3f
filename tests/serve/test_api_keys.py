"""API keys: their form, where they are kept, and that no route is served without one."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_service import Service
from starlette.routing import Route

from steelyard.errors import ConfigError
from steelyard.serve.auth import PROJECT_SCOPES, PUBLIC_ROUTES, fixed_keys
from steelyard.serve.keys import BASE62, checksum, is_well_formed, mac, new_key, redacted
from steelyard.serve.service import open_service
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import Secrets, open_secrets


def test_a_key_has_the_published_form() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key.startswith("sk-sy-")
        assert len(key) == 6 + 30 + 6
        assert set(key[6:]) <= set(BASE62)
        assert is_well_formed(key)


def test_the_checksum_is_crc32_in_base62() -> None:
    digits = checksum("123456789")
    assert sum(BASE62.index(digit) * 62**place for place, digit in enumerate(reversed(digits))) == 0xCBF43926
    assert checksum("") == "000000"


@given(st.integers(6, 41), st.sampled_from(BASE62))
def test_a_mistyped_character_shows(position: int, character: str) -> None:
    key = new_key()
    mistyped = key[:position] + character + key[position + 1 :]
    assert is_well_formed(mistyped) == (mistyped == key)


@given(st.text(max_size=60))
def test_what_is_kept_of_a_key_is_no_use(presented: str) -> None:
    key = new_key()
    pepper = b"p" * 32
    kept = mac(pepper, key)
    assert key.encode() not in kept
    assert (mac(pepper, presented) == kept) == (presented == key)
    assert mac(b"q" * 32, key) != kept
    assert redacted(key)[:-4].rstrip(".") == key[:9]


def test_secrets_are_made_once_and_nobody_else_reads_them(tmp_path: Path) -> None:
    environment = {"STEELYARD_HOME": str(tmp_path / "state")}
    secrets = open_secrets(environment)
    assert open_secrets(environment) == secrets
    files = list((tmp_path / "state").iterdir())
    assert [file.name for file in files] == ["secrets.json"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert "chain" not in repr(secrets)
    files[0].chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        open_secrets(environment)


def test_two_first_starts_at_once_make_one_file(tmp_path: Path) -> None:
    environment, made = {"STEELYARD_HOME": str(tmp_path)}, []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        made.append(open_secrets(environment))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == made[:1] * 8


def test_keys_of_the_environment_are_not_stored(tmp_path: Path) -> None:
    environment = {"STEELYARD_API_KEY": "any thing", "STEELYARD_ADMIN_KEY": "another"}
    with opened(sqlite_url(tmp_path / "db"), role="server") as database:
        service = open_service({}, database, Secrets.make(), tmp_path, environment=environment)
        assert service.first_keys == {}
        caller, admin = (asyncio.run(service.keys.identify(key)) for key in environment.values())
        assert caller is not None
        assert admin is not None
        assert caller.project_id is not None
        assert admin.project_id is None
        assert asyncio.run(service.keys.identify("any thing ")) is None
    assert b"any thing" not in b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    with opened(sqlite_url(tmp_path / "db"), role="server") as database, pytest.raises(ConfigError, match="never"):
        open_service({}, database, Secrets.make(), tmp_path, environment=dict.fromkeys(environment, "same"))


def test_the_first_start_makes_keys_and_the_next_one_accepts_them(tmp_path: Path) -> None:
    secrets = Secrets.make()
    with opened(sqlite_url(tmp_path / "db"), role="server") as database:
        keys = open_service({}, database, secrets, tmp_path, environment={}).first_keys
        assert keys.keys() == {"project", "admin"}
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    for key in keys.values():
        assert key.encode() not in stored
        assert key[6:36].encode() not in stored
    with opened(sqlite_url(tmp_path / "db"), role="server") as database:
        again = open_service({}, database, secrets, tmp_path, environment={})
        assert again.first_keys == {}
        caller = asyncio.run(again.keys.identify(keys["project"]))
        assert caller is not None
        assert caller.scopes == set(PROJECT_SCOPES)
        assert asyncio.run(again.keys.identify(new_key())) is None


@pytest.mark.parametrize("key", ["key\n", " key", "schlüssel", "a\tb", " "])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="STEELYARD_API_KEY"):
        fixed_keys(b"p" * 32, "proj_x", {"STEELYARD_API_KEY": key})


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"pepper": "00", "chain": "", "root": ""}'])
def test_a_broken_file_of_secrets_is_said_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secrets.json").write_bytes(content)
    (tmp_path / "secrets.json").chmod(0o600)
    with pytest.raises(ConfigError, match=r"secrets\.json"):
        open_secrets({"STEELYARD_HOME": str(tmp_path)})
    assert (tmp_path / "secrets.json").read_bytes() == content


def test_a_state_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="STEELYARD_HOME"):
        open_secrets({"STEELYARD_HOME": str(tmp_path / "file" / "state")})


def calls(service: Service) -> Iterator[tuple[str, str]]:
    """Every route of the application with every method, and paths that do not exist."""
    for route in service.app.routes:
        assert isinstance(route, Route), f"{route} must be covered here"
        for path in (route.path_format, route.path_format.replace("{model_id}", "tiny")):
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                yield method, path
    for path in ("/", "/v1", "/v1/nothing", "/openapi.yaml", "/docs", "/health/", "//health", "/HEALTH", "/health/x"):
        yield "GET", path


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer x{key}",
        "Bearer {other}",
    ],
)
def test_no_route_is_served_without_a_key(service: Service, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.format(key=service.key, other=new_key())}
    with service.http() as http:
        del http.headers["authorization"]
        for method, path in calls(service):
            # A body that would be refused if anybody read it.
            response = http.request(method, path, headers=headers, content=b"{")
            if path in PUBLIC_ROUTES and method in ("GET", "HEAD"):
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, (method, path)
                assert response.headers["x-request-id"].startswith("req_")
                if method != "HEAD":
                    error = response.json()["error"]
                    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


def test_two_authorization_headers_are_refused(service: Service) -> None:
    with service.http() as http:
        headers = [("authorization", f"Bearer {service.key}"), ("authorization", f"Bearer {service.key}")]
        del http.headers["authorization"]
        assert http.get("/v1/models", headers=headers).status_code == 401


def test_the_host_header_does_not_open_a_way(service: Service) -> None:
    with service.http() as http:
        del http.headers["authorization"]
        for host in ("x/health?", "127.0.0.1/health#"):
            assert http.get("/v1/models", headers={"host": host}).status_code in (400, 401)


def test_the_sdk_says_it_in_its_own_words(service: Service) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        service.sdk(api_key=new_key()).models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="mistyped"):
        service.sdk(api_key=new_key()[:-1] + "!").models.list()
