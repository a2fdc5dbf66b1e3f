"""What the references of a JSON schema lead to within it, by place: `#`, `#/…`."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote


class References:
    """Of one schema, whose parts have no names of their own (`recursion.plain_names`).

    Args:
        root: the schema.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._led: dict[str, Any] = {}

    def lead(self, schema: dict[str, Any]) -> Any:
        """What the `$ref` of a schema within the root names; None: nothing here."""
        reference = schema["$ref"]
        if reference not in self._led:
            self._led[reference] = self._found(unquote(reference[1:]))
        return self._led[reference]

    def _found(self, place: str) -> Any:
        found: Any = self._root
        for part in place.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(part)
            elif isinstance(found, list) and re.fullmatch("[0-9]{1,6}", part) and int(part) < len(found):
                found = found[int(part)]
            else:
                return None
        return found
