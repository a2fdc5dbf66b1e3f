"""The command line in this process: what it prints and the code it exits with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from steelyard.cli import main


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> Any:
        """What --json promises: the last line of stdout is one object, in strict JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        found = json.loads(self.out.splitlines()[-1], parse_constant=refuse)
        assert isinstance(found, dict)
        return found

    def complaint(self, code: int) -> str:
        """The one line of an error, checked: this exit code, no traceback, printable."""
        assert "Traceback" not in self.err, self.err
        assert self.code == code, self.err
        (line,) = [line for line in self.err.splitlines() if line.strip()]
        assert line.startswith("error: ")
        assert line.isprintable()
        return line.removeprefix("error: ")


class Command:
    """Runs verbs; `command("data", "x.csv")`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, err)
