"""`/metrics`: Prometheus's text format, with what the engines said of their work."""

from __future__ import annotations

import openai
from prometheus_client.parser import text_string_to_metric_families
from running_service import Service, eventually

from steelyard.serve.endpoints.metrics import METRICS


def scrape(service: Service) -> dict[str, float]:
    with service.http() as http:
        response = http.get("/metrics", headers={"authorization": f"Bearer {service.admin_key}"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text.endswith("\n")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            assert sample.name.startswith("steelyard:")
            if sample.labels.get("model_name", "tiny") != "tiny":  # others share the server, and come when they like
                continue
            rest = [value for name, value in sample.labels.items() if name != "model_name"]
            found[" ".join([sample.name, *rest])] = sample.value
    return found


def test_it_needs_an_admin_key(service: Service) -> None:
    with service.http() as http:
        assert http.get("/metrics").status_code == 403
        del http.headers["authorization"]
        assert http.get("/metrics").status_code == 401


def test_what_the_engines_did(service: Service, client: openai.OpenAI) -> None:
    before = scrape(service)
    shown = {name.removesuffix("_total") for name in before}
    assert shown >= {f"steelyard:{name.removesuffix('_total')}" for name in METRICS}
    client.completions.create(model="tiny", prompt="Hello", max_tokens=5)
    grown = eventually(lambda: (now := scrape(service)) != before and now)
    assert eventually(lambda: scrape(service)["steelyard:num_requests_running"] == 0)
    name = "steelyard:generation_tokens_total"
    assert eventually(lambda: scrape(service)[name] - before[name] == 5)
    assert grown["steelyard:kv_cache_usage_perc"] == 0.25


def test_what_requests_were_like(service: Service, client: openai.OpenAI) -> None:
    before = scrape(service)
    for streamed in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=5, n=2, stream=streamed
        )
        if streamed:
            list(answer)

    def more(name: str) -> float:
        return scrape(service)[name] - before.get(name, 0)

    assert eventually(lambda: more("steelyard:e2e_request_latency_seconds_count") == 2)
    assert more("steelyard:request_success_total length") == 4
    assert more("steelyard:time_to_first_token_seconds_count") == 2
    assert more("steelyard:inter_token_latency_seconds_count") > 0
    for phase in ("queue", "prefill", "decode"):
        assert more(f"steelyard:request_{phase}_time_seconds_count") == 2
    assert scrape(service)["steelyard:requests_without_usage_total"] == 0


def test_the_phases_of_a_request_are_the_engines(service: Service, client: openai.OpenAI) -> None:
    """Each prompt is one observation, of what the engine says: here 20 ms from token to token."""
    before = scrape(service)
    client.completions.create(model="tiny", prompt=["a", "b", "c"], max_tokens=6, n=2, seed=20)

    def more(name: str) -> float:
        return scrape(service)[f"steelyard:request_{name}"] - before.get(f"steelyard:request_{name}", 0)

    for phase in ("queue", "prefill", "decode"):
        assert more(f"{phase}_time_seconds_count") == 3
    assert 3 * 5 * 0.02 <= more("decode_time_seconds_sum") < 10
    assert more("queue_time_seconds_sum") == 0
    assert more("prefill_time_seconds_sum") < more("decode_time_seconds_sum")
