"""Every form of the native kernels that this processor runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from steelyard.kernels import library
from steelyard.kernels.library import FORMS, Library, processor_flags

NATIVE = [form for form, needs in FORMS.items() if needs <= processor_flags()]


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Library:
    path = Path(library.__file__).parent / f"kernels-{request.param}.so"
    if not path.is_file():
        pytest.skip("the native kernels were not built: no C++ compiler")
    found = Library(path)
    assert found.form == request.param
    return found
