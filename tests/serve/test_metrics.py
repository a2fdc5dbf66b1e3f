"""`/metrics`: Prometheus's text format, with what the engines said of their work."""

from __future__ import annotations

import re

import openai
from running_service import Service, eventually

from steelyard.serve.endpoints.metrics import METRICS

SAMPLE = re.compile(r'(steelyard:[a-z_]+)\{model_name="((?:[^"\\]|\\.)*)"\} ([0-9.e+-]+)')


def scrape(service: Service) -> dict[str, float]:
    with service.http() as http:
        response = http.get("/metrics", headers={"authorization": f"Bearer {service.admin_key}"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text.endswith("\n")
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in response.text.splitlines():
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE")
            assert what == "HELP" or rest in ("counter", "gauge")
            described.add(name)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert match[1] in described
        assert match[2] == "tiny"
        found[match[1]] = float(match[3])
    return found


def test_it_needs_an_admin_key(service: Service) -> None:
    with service.http() as http:
        assert http.get("/metrics").status_code == 403
        del http.headers["authorization"]
        assert http.get("/metrics").status_code == 401


def test_what_the_engines_did(service: Service, client: openai.OpenAI) -> None:
    before = scrape(service)
    assert set(before) == {f"steelyard:{name}" for name in METRICS}
    client.completions.create(model="tiny", prompt="Hello", max_tokens=5)
    grown = eventually(lambda: (now := scrape(service)) != before and now)
    assert eventually(lambda: scrape(service)["steelyard:num_requests_running"] == 0)
    name = "steelyard:generation_tokens_total"
    assert eventually(lambda: scrape(service)[name] - before[name] == 5)
    assert grown["steelyard:kv_cache_usage_perc"] == 0.25
