"""What the references of a JSON schema lead to within it: by place (`#/…`), by `$anchor`, by `$id`."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin


class References:
    """Of one schema.

    Args:
        root: the schema. What is in it is known by identity, so it has to outlive this.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._places: dict[str, Any] = {"": root}
        self._bases: dict[int, str] = {}
        self._led: dict[tuple[str, str], Any] = {}
        own = "id" if "draft-04" in str(root.get("$schema")) else "$id"
        waiting: list[tuple[Any, str]] = [(root, "")]
        while waiting:
            one, base = waiting.pop()
            if isinstance(one, dict):
                base = self._named(one, one.get(own), one.get("$anchor"), base)
                self._bases[id(one)] = base
                waiting += [(value, base) for value in one.values()]
            elif isinstance(one, list):
                waiting += [(value, base) for value in one]

    def lead(self, schema: dict[str, Any]) -> Any:
        """What the `$ref` of a schema within the root names; None: nothing here."""
        base, reference = self._bases.get(id(schema), ""), schema["$ref"]
        if (base, reference) not in self._led:
            self._led[base, reference] = self._found(_joined(base, reference))
        return self._led[base, reference]

    def _named(self, schema: dict[str, Any], own: Any, anchor: Any, base: str) -> str:
        """Remember a schema by its names; what the references in it are relative to."""
        if isinstance(own, str):
            place, fragment = urldefrag(_joined(base, own))
            self._places.setdefault(f"{place}#{fragment}" if fragment else place, schema)
            base = base if fragment else place
        if isinstance(anchor, str):
            self._places.setdefault(f"{base}#{anchor}", schema)
        return base

    def _found(self, place: str) -> Any:
        place, fragment = urldefrag(place)
        fragment = unquote(fragment)
        if fragment[:1] not in ("/", ""):
            return self._places.get(f"{place}#{fragment}")
        found: Any = self._places.get(place)
        for part in fragment.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(part)
            elif isinstance(found, list) and re.fullmatch("[0-9]{1,6}", part) and int(part) < len(found):
                found = found[int(part)]
            else:
                return None
        return found


def _joined(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:  # no address at all
        return reference
