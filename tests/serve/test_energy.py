"""Energy by RAPL's counters. The machines of these tests have none: a folder laid out like powercap's stands in."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from running_service import Service

from steelyard.serve import energy
from steelyard.serve.energy import Energy

RANGE = 262_143_328_850


def zone(folder: Path, number: str, name: str, microjoules: int) -> Path:
    """One of powercap's folders."""
    made = folder / f"intel-rapl:{number}"
    made.mkdir(parents=True)
    (made / "name").write_text(f"{name}\n")
    (made / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made


def count(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, with the parts of one, the whole machine's counter and the driver's own folder."""
    (tmp_path / "intel-rapl").mkdir()
    for number, name, shown in (
        ("0", "package-0", 5_000_000),
        ("0:0", "core", 7),
        ("0:1", "dram", 7),
        ("1", "package-1", RANGE - 1_000_000),
        ("2", "psys", 7),
    ):
        zone(tmp_path, number, name, shown)
    return tmp_path


def test_packages_count_from_the_start(powercap: Path) -> None:
    counters = Energy(powercap)
    assert counters.joules() == {"package-0": 0, "package-1": 0}
    count(powercap / "intel-rapl:0", 7_500_000)
    assert counters.joules() == {"package-0": 2.5, "package-1": 0}


def test_a_counter_that_comes_round_goes_on(powercap: Path) -> None:
    counters = Energy(powercap)
    for shown, joules in ((500_000, 1.5), (RANGE - 500_000, 262_143.32885 + 0.5), (500_000, 262_143.32885 + 1.5)):
        count(powercap / "intel-rapl:1", shown)
        assert counters.joules()["package-1"] == pytest.approx(joules)


def test_counters_are_read_between_scrapes(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "READ_SECONDS", 0.001)
    counters = Energy(powercap)

    async def twice_round() -> None:
        watching = asyncio.create_task(counters.watch())
        for shown in (RANGE // 2, 0, RANGE // 2, 0):
            count(powercap / "intel-rapl:0", shown)
            await asyncio.sleep(0.1)
        watching.cancel()

    asyncio.run(twice_round())
    assert counters.joules()["package-0"] == pytest.approx(2 * RANGE / 1e6 - 5)


def test_none_is_no_energy_and_no_line_of_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counters = Energy(tmp_path / "missing")
    assert counters.joules() == {}
    asyncio.run(asyncio.wait_for(counters.watch(), 1))
    assert not caplog.records


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_that_may_not_be_read_is_no_energy_and_one_line(
    powercap: Path, when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, and tests may run as root: the system's refusal is stood in for."""
    read_text = Path.read_text

    def refuse(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    if when == "after":
        counters = Energy(powercap)
        assert counters.joules()
    monkeypatch.setattr(Path, "read_text", refuse)
    with caplog.at_level(logging.INFO):
        if when == "before":
            counters = Energy(powercap)
        for _ in range(3):
            assert counters.joules() == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "intel-rapl:0/energy_uj" in caplog.text


def test_metrics_show_it(fragile: Service, powercap: Path) -> None:
    fragile.behind.energy = Energy(powercap)
    count(powercap / "intel-rapl:0", 6_000_000)
    with fragile.admin_http() as http:
        shown = http.get("/metrics").text
        assert 'steelyard:energy_joules_total{package="package-0"} 1.0\n' in shown
        assert "# TYPE steelyard:energy_joules_total counter\n" in shown
        fragile.behind.energy = Energy(powercap / "missing")
        shown = http.get("/metrics").text
    assert "steelyard:energy_joules_total{" not in shown
    assert "Absent if unreadable" in shown
