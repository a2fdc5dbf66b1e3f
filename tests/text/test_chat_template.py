from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from steelyard.errors import CheckpointError, TemplateError
from steelyard.text.chat_template import ChatTemplate

TEMPLATES = Path(__file__).parent / "templates"
NAMES = ("chatml", "llama3", "mistral", "qwen3")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  What is <b>5 & 3</b>?\n"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nEight — „acht“ 😀"}
TOOL = {"role": "tool", "content": '{"a": "ü"}'}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    [USER, ASSISTANT, TOOL, TOOL, ASSISTANT],
]


@pytest.fixture(scope="module")
def reference(tiny_tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer_folder: Path) -> Iterator[ChatTemplate]:
    template = ChatTemplate.load(tiny_tokenizer_folder)
    assert template is not None
    yield template
    template.close()


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_transformers(reference: PreTrainedTokenizerFast, name: str) -> None:
    source = (TEMPLATES / f"{name}.jinja").read_text()
    template = template_of(source)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            expected: str | Exception
            try:
                expected = reference.apply_chat_template(
                    messages, chat_template=source, add_generation_prompt=prompt, tokenize=False
                )
            except Exception as error:
                expected = error
            if isinstance(expected, str):
                assert template.render(messages, add_generation_prompt=prompt) == expected
            else:
                with pytest.raises(TemplateError, match=re.escape(str(expected))):
                    template.render(messages, add_generation_prompt=prompt)


def test_globals_and_filters_are_transformers(reference: PreTrainedTokenizerFast) -> None:
    source = (
        "{%- for m in messages %}{{ m | tojson }}{{ [m] | tojson(indent=2) }}{{ m | tojson(sort_keys=true) }}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') }}{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(a=1) }}"
        "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ bos_token }}{{ eos_token }}"
    )
    messages = [USER, ASSISTANT, USER]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    text = template_of(source).render(messages, add_generation_prompt=False)
    assert text == expected
    assert str(datetime.now().year) in text


def test_render_many_is_render(chatml: ChatTemplate) -> None:
    wanted = [([{"role": "user", "content": f"{n}"}], n % 2 == 0) for n in range(700)]
    assert chatml.render_many(wanted) == [chatml.render(m, add_generation_prompt=p) for m, p in wanted]
    assert chatml.render_many([]) == []


def test_render_many_names_the_conversation_that_fails() -> None:
    template = template_of("{{ raise_exception('no cats') if messages[0].content == 'cat' }}{{ messages[0].content }}")
    batch = [([{"role": "user", "content": "dog"}], True) for _ in range(400)]
    batch[300] = ([{"role": "user", "content": "cat"}], True)
    with pytest.raises(TemplateError, match=r"^conversation 300: the chat template raised: no cats$"):
        template.render_many(batch)
    assert template.render([{"role": "user", "content": "bird"}]) == "bird", "no answer is left over"


def test_each_rendering_has_its_own_time() -> None:
    loop = "{% for i in range(20000) %}{% set x = i * i %}{% endfor %}{{ messages[0].content }}"
    template = template_of(loop)
    assert len(template.render_many([([USER], False)] * 100)) == 100


def test_speed(chatml: ChatTemplate) -> None:
    chatml.render([USER])
    begin = time.perf_counter()
    chatml.render_many([([SYSTEM, USER, ASSISTANT], False)] * 3000)
    assert time.perf_counter() - begin < 1
    latencies = []
    for _ in range(200):
        begin = time.perf_counter()
        chatml.render([SYSTEM, USER])
        latencies.append(time.perf_counter() - begin)
    assert sorted(latencies)[100] < 0.001


def test_threads_share_one_worker(chatml: ChatTemplate) -> None:
    def render(n: int) -> bool:
        return f"<{n}>" in chatml.render([{"role": "user", "content": f"<{n}>"}])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(400)))


def test_a_long_conversation_passes_and_a_longer_one_does_not(chatml: ChatTemplate) -> None:
    text = "😀" * 900_000
    assert text in chatml.render([{"role": "user", "content": text}])
    with pytest.raises(TemplateError, match="over 1,000,000 characters"):
        chatml.render([{"role": "user", "content": text + text}])
    with pytest.raises(TemplateError, match="conversation 1: the conversation is over"):
        chatml.render_many([([USER], True), ([{"role": "user", "content": text + text}], True)])
    with pytest.raises(TemplateError, match="surrogate"):
        chatml.render([{"role": "user", "content": "\ud800"}])
    assert chatml.render([USER])


def test_a_dead_or_stopped_worker_is_replaced(chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = chatml.render([USER])
    worker = chatml._process.start()
    worker.kill()
    worker.wait()
    assert chatml.render([USER]) == expected

    worker = chatml._process.start()
    os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr("steelyard.text.worker_process.WALL_SECONDS", 0.2)
    with pytest.raises(TemplateError, match="did not answer in time"):
        chatml.render([USER])
    assert worker.poll() is not None
    monkeypatch.undo()
    assert chatml.render([USER]) == expected


def test_a_fork_has_a_worker_of_its_own(chatml: ChatTemplate) -> None:
    expected, pid = chatml.render([USER]), chatml._process.start().pid
    with chatml._process._lock:  # as if another thread were rendering
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if chatml.render([USER]) == expected and chatml._process.start().pid != pid else 1)
            except BaseException:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert chatml.render([USER]) == expected
    assert chatml._process.start().pid == pid


def alive(pid: int) -> bool:
    """It runs. One that has ended and that init has not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os._exit(0)", "raise SystemExit(1)"])
def test_the_worker_ends_with_its_parent(end: str) -> None:
    script = f"""
        import os
        from steelyard.text.chat_template import ChatTemplate
        template = ChatTemplate("x", bos_token="", eos_token="")
        template.render([])
        print(template._process.start().pid, flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    deadline = time.monotonic() + 5
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(int(done.stdout))


def test_a_dropped_template_leaves_no_process() -> None:
    template = template_of("x")
    template.render([])
    worker = template._process.start()
    del template
    assert worker.poll() is not None


def test_the_worker_sees_no_secrets_and_no_files(chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    template = template_of("x")
    template.render([])
    process = Path(f"/proc/{template._process.start().pid}")
    assert b"secret" not in (process / "environ").read_bytes()
    assert sorted(entry.name for entry in (process / "fd").iterdir()) == ["0", "1", "2"]
    limits = {line[:25].strip(): line[26:].split()[0] for line in (process / "limits").read_text().splitlines()}
    assert (limits["Max open files"], limits["Max processes"], limits["Max core file size"]) == ("3", "0", "0")
    assert limits["Max file size"] == "0"


# Loading


def test_load_prefers_the_jinja_file(tmp_path: Path) -> None:
    config = {"chat_template": "old", "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("new{{ bos_token }}{{ eos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "new</s>"


@pytest.mark.parametrize(
    ("declared", "source"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], "r"),
        ([], None),
        (None, None),
    ],
)
def test_load_from_the_config(tmp_path: Path, declared: object, source: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": declared}))
    template = ChatTemplate.load(tmp_path)
    assert (None if template is None else template.source) == source


def test_a_folder_without_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("chat_template.jinja", b"x" * ((256 << 10) + 1), "over 256 KB"),
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * 300_000}).encode(), "over 256 KB"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "neither"),
        ("tokenizer_config.json", b"{", "not JSON"),
    ],
)
def test_broken_templates_are_refused_by_name(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as error:
        ChatTemplate.load(tmp_path)
    assert name in str(error.value)


# Segments


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_real_templates(name: str) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    messages = [SYSTEM, USER, {"role": "assistant", "content": "Eight."}]
    (segments,) = template.render_segments([messages])
    assert "".join(segment.text for segment in segments) == template.render(messages, add_generation_prompt=False)
    (spoken,) = [segment.text for segment in segments if segment.trained]
    end = {"llama3": "<|eot_id|>"}.get(name, "<|im_end|>")
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else " " if name == "mistral" else ""
    assert spoken == f"{thought}Eight.{end}"


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant"]),
            "content": st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
        }
    ),
    max_size=6,
).map(lambda messages: [SYSTEM, *messages])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MESSAGES, max_size=4))
def test_segments_add_up_and_train_what_the_assistant_says(
    chatml: ChatTemplate, conversations: list[list[dict[str, str]]]
) -> None:
    result = chatml.render_segments(conversations)
    assert len(result) == len(conversations)
    for messages, segments in zip(conversations, result, strict=True):
        assert "".join(segment.text for segment in segments) == chatml.render(messages, add_generation_prompt=False)
        spoken = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert [segment.text for segment in segments if segment.trained] == spoken
        assert all(segment.text for segment in segments)


def test_an_inconsistent_template_is_refused() -> None:
    template = template_of((TEMPLATES / "qwen3.jinja").read_text())  # rewrites earlier turns: their thoughts go
    with pytest.raises(TemplateError, match=r"conversation 1: .*not prefix-consistent"):
        template.render_segments([[USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]])


def test_segments_name_the_conversation_that_fails() -> None:
    template = template_of((TEMPLATES / "mistral.jinja").read_text())
    with pytest.raises(TemplateError, match=r"conversation 1: .*alternate"):
        template.render_segments([[USER, ASSISTANT], [USER, ASSISTANT, ASSISTANT]])
