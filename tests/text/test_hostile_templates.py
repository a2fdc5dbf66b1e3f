"""Hostile templates end in TemplateError within their limits of processor time and memory, and harm nobody else."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from hostile_templates import HOSTILE

from steelyard.errors import TemplateError
from steelyard.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = resource.getpagesize()


def seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def ended_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str, tiny_tokenizer_folder: Path) -> None:
    template = ChatTemplate(HOSTILE[name], bos_token="", eos_token="")
    worker = template._process.start()
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    (address_space,) = [int(line.split()[3]) for line in limits.splitlines() if line.startswith("Max address space")]
    size = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0]) * PAGE
    assert address_space <= size + (64 << 20)

    begin = ended_children() + seconds(worker.pid)
    with pytest.raises(TemplateError, match="chat template") as error:
        template.render(MESSAGES)
    template.close()
    assert ended_children() - begin < 0.2
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_legitimate_template_renders_after_every_attack() -> None:
    """One template that misbehaves on demand, in one and the same object."""
    template = ChatTemplate(
        "{% set n = messages | length * 10 %}{% if messages[0].content == 'time' %}{{ n ** (n ** 9) }}"
        "{% elif messages[0].content == 'memory' %}{{ messages[0].content * 10 ** 9 }}"
        "{% elif messages[0].content == 'output' %}{{ messages[0].content * 10 ** 6 }}"
        "{% elif messages[0].content == 'depth' %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
        "{% else %}fine{% endif %}",
        bos_token="",
        eos_token="",
    )
    reasons = {"time": "took over 150 ms", "memory": "needed over 64 MB", "output": "wrote over", "depth": "nests too"}
    assert template.render(MESSAGES) == "fine"
    for attack, reason in reasons.items():
        with pytest.raises(TemplateError, match=reason):
            template.render([{"role": "user", "content": attack}])
        assert template.render(MESSAGES) == "fine"
    assert template.render_many([(MESSAGES, True)] * 3) == ["fine"] * 3


def test_an_attack_does_not_delay_other_templates(tiny_tokenizer_folder: Path) -> None:
    victim = ChatTemplate.load(tiny_tokenizer_folder)
    assert victim is not None
    expected = victim.render(MESSAGES)

    def attack() -> None:
        for _ in range(3):
            with pytest.raises(TemplateError):
                ChatTemplate("{{ 10 ** (10 ** 9) }}", bos_token="", eos_token="").render([])

    thread = threading.Thread(target=attack)
    thread.start()
    while thread.is_alive():
        assert victim.render(MESSAGES) == expected
    thread.join()
