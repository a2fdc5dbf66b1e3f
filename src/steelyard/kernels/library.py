"""The native library: found, loaded, called. One file per instruction set, built with the package (see setup.py).

It brings no OpenMP runtime of its own: a second one beside torch's would halve everything.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch

log = logging.getLogger(__name__)

AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni"})
FORMS: dict[str, frozenset[str]] = {
    "amx": AVX512 | {"amx_tile", "amx_int8", "amx_bf16"},
    "avx512": AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi2"}),
    "portable": frozenset(),
}
"""Instruction sets, the fastest first, and the processor's flags that each needs."""
INTERFACE = 5
"""What `steelyard_interface` says where functions and arguments are those that are called here."""
CHOICE = "STEELYARD_KERNELS"
"""Environment variable: one of `FORMS`, or `torch` for the twins in PyTorch."""


class Library:
    """The loaded library.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be loaded, or the system refuses this process what it needs.
    """

    def __init__(self, path: Path) -> None:
        ctypes.CDLL(openmp_runtime(), ctypes.RTLD_GLOBAL)
        self.native = ctypes.CDLL(str(path))
        if not hasattr(self.native, "steelyard_interface") or self.native.steelyard_interface() != INTERFACE:
            raise OSError("it was built for another version: install again (pip install -e ., or make setup)")
        self.native.steelyard_isa.restype = ctypes.c_char_p
        if not self.native.steelyard_prepare():
            raise OSError("the system does not lend what the processor has")
        pointer = ctypes.c_void_p
        self.native.steelyard_run.argtypes = (pointer, ctypes.c_int32, pointer, pointer, pointer)
        for pack in (self.native.steelyard_pack, self.native.steelyard_pack_halves):
            pack.argtypes = (pointer, ctypes.c_int64, ctypes.c_int64, pointer)
        number = ctypes.c_int32
        self.native.steelyard_draw.argtypes = (pointer, number, number, pointer, pointer)
        self.form = str(self.native.steelyard_isa().decode())

    def run(self, steps: int, count: int, buffers: int, batch: int, seconds: int | None = None) -> None:
        """Run `count` steps; all are addresses. `seconds`, where given, gets each step's time added (float64)."""
        self.native.steelyard_run(steps, count, buffers, batch, seconds)

    def draw(self, logits: torch.Tensor, draws: int, tokens: torch.Tensor) -> None:
        """Logits `[N, V]` float32, the address of N draws -> tokens `[N]` int32, -1 where a row is not finite."""
        assert logits.is_contiguous()
        self.native.steelyard_draw(logits.data_ptr(), *logits.shape, draws, tokens.data_ptr())

    def pack(self, weight: torch.Tensor, packed: torch.Tensor, bits: int) -> None:
        """`[N, K]` int8 -> `[ceil(N / 32), K * bits / 32, 32, 4]` uint8: each weight plus 128, or two plus 8 a byte."""
        assert weight.is_contiguous()
        assert packed.is_contiguous()
        assert weight.shape[1] % (32 // bits) == 0
        pack = self.native.steelyard_pack if bits == 8 else self.native.steelyard_pack_halves
        pack(weight.data_ptr(), weight.shape[0], weight.shape[1], packed.data_ptr())


@functools.cache
def load() -> Library | None:
    """The library for this processor; None where it was not built, or the twins are asked for."""
    wanted = os.environ.get(CHOICE)
    if wanted == "torch":
        return None
    flags = processor_flags()
    for form, needs in FORMS.items():
        path = Path(__file__).parent / f"kernels-{form}.so"
        if (wanted or form) != form or not needs <= flags or not path.is_file():
            continue
        try:
            return Library(path)
        except OSError as error:
            log.warning("the native kernels '%s' cannot be loaded (%s)", form, error)
    log.warning("no native kernels here (no C++ compiler when this was installed?): PyTorch runs instead, slower")
    return None


def processor_flags() -> frozenset[str]:
    """The instruction sets that this processor has, as Linux names them."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def openmp_runtime() -> str:
    """The OpenMP runtime that torch has loaded into this process.

    Raises:
        OSError: there is none.
    """
    torch.get_num_threads()
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.rpartition(" ")[2]
        if "libgomp" in name or "libiomp5" in name or "libomp.so" in name:
            return name
    raise OSError("torch has no OpenMP runtime here")
