"""Every form of the native kernels that this processor runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steelyard.kernels import library
from steelyard.kernels.library import FORMS, Library, processor_flags

NATIVE = [form for form, needs in FORMS.items() if needs <= processor_flags()]


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Library]:
    """One form, on two threads, however many the test run has."""
    path = Path(library.__file__).parent / f"kernels-{request.param}.so"
    if not path.is_file():
        pytest.skip("the native kernels were not built: no C++ compiler")
    found = Library(path)
    assert found.form == request.param
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(before)
