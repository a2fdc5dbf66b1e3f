"""Settings: frozen msgspec structs from TOML, changed by `--set a.b=c`; an unknown key names the nearest.

Knows no setting of its own: each stands in a struct beside the component that it belongs to.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from steelyard.errors import ConfigError

MAX_BYTES = 1 << 20
T = TypeVar("T", bound=msgspec.Struct)


def load(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a TOML file into a struct.

    Args:
        path: the file.
        kind: a msgspec struct; nested structs are tables.
        overrides: `a.b=value` assignments that win over the file; the value is TOML, or else a plain string.

    Raises:
        ConfigError: the file, the key and the nearest known key, or what the value should be.
    """
    return convert(read(path), kind, overrides, str(path))


def read(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    if not path.is_file():
        raise ConfigError(f"no file '{path}'" + (": this is a folder" if path.is_dir() else ""))
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"'{path}' is over {MAX_BYTES >> 20} MB: this is no configuration")
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of thousands of digits
        raise ConfigError(f"'{path}' is not TOML: {error}") from None


def convert(raw: dict[str, Any], kind: type[T], overrides: Sequence[str] = (), source: str = "settings") -> T:
    """Build a struct from plain values; see `load`."""
    raw = assigned(raw, overrides)
    _check_keys(raw, kind, "", source)
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_plain(str(error), kind)}") from None


def assigned(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with `a.b=value` assignments done, keys unchecked.

    Raises:
        ConfigError: what is no assignment, or one into a value.
    """
    raw = copy.deepcopy(raw)
    for override in overrides:
        _assign(raw, override)
    return raw


def _assign(raw: dict[str, Any], assignment: str) -> None:
    path, equals, value = assignment.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set {assignment}: write it as table.key=value")
    try:
        found = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        found = {}
    # Whatever a line end begins (another key, a table) nobody asked for: then it is a plain string, too.
    parsed = found["value"] if found.keys() == {"value"} else value.strip()
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment}: '{key}' is a value, not a table")
    table[keys[-1]] = parsed


def _structs(kind: Any) -> list[type[msgspec.Struct]]:
    """The structs in a field's type: `S`, `S | None`, or several that a tag tells apart."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return [option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct)]


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    """The struct in a field's type, if there is exactly one."""
    structs = _structs(kind)
    return structs[0] if len(structs) == 1 else None


def _tagged(kind: Any, value: Any, path: str, source: str) -> type[msgspec.Struct] | None:
    """Which of the structs in a field's type a value is.

    Raises:
        ConfigError: its tag is missing or not known.
    """
    structs = _structs(kind)
    if len(structs) < 2 or not isinstance(value, dict):
        return structs[0] if len(structs) == 1 else None
    tags = {str(struct.__struct_config__.tag): struct for struct in structs}
    field = str(structs[0].__struct_config__.tag_field)
    if str(value.get(field)) not in tags:
        raise ConfigError(f"{source}: {path}.{field} must be one of {', '.join(tags)}")
    return tags[str(value[field])]


def _listed(kind: Any) -> type[msgspec.Struct] | None:
    """The struct in a list's type: `tuple[S, ...]`."""
    return _struct(typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else None


def _check_keys(raw: Any, kind: type[msgspec.Struct], where: str, source: str) -> None:
    if not isinstance(raw, dict):
        return  # the conversion says what it should be
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    if kind.__struct_config__.tag_field is not None:
        fields[kind.__struct_config__.tag_field] = str
    for key, value in raw.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
            inside = [path for path in _paths(kind) if path.rpartition(".")[2] == key]
            right = inside or near
            hint = f"did you mean '{where}{right[0]}'?" if right else f"known here: {', '.join(fields)}"
            raise ConfigError(f"{source}: unknown key '{where}{key}'; {hint}")
        nested = _tagged(fields[key], value, f"{where}{key}", source)
        if nested is not None:
            _check_keys(value, nested, f"{where}{key}.", source)
        listed = _listed(fields[key])
        if listed is not None and isinstance(value, list | tuple):
            for number, item in enumerate(value):
                _check_keys(item, listed, f"{where}{key}[{number}].", source)


def _paths(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Every key below a struct, as the user writes it."""
    for field in msgspec.structs.fields(kind):
        nested = _struct(field.type)
        yield prefix + field.encode_name
        if nested is not None:
            yield from _paths(nested, f"{prefix}{field.encode_name}.")


def _plain(message: str, kind: type[msgspec.Struct]) -> str:
    """Msgspec's message with `$.a.b` written as the key that the user wrote, and the values that a choice has."""
    path = message.partition(" - at `$.")[2].rstrip("`")
    choices = ", ".join(map(str, _choices(kind, path.split(".")))) if "Invalid enum" in message else ""
    plain = message.replace(" - at `$.", " at `").replace("Object missing", "missing").replace(" - at `$`", "")
    return f"{plain}; known: {choices}" if choices else plain


def _choices(kind: type[msgspec.Struct], keys: Sequence[str]) -> tuple[Any, ...]:
    """The values that a `Literal` field admits; none for any other."""
    found = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}.get(keys[0])
    nested = _struct(found)
    if nested is not None and len(keys) > 1:
        return _choices(nested, keys[1:])
    return typing.get_args(found) if typing.get_origin(found) is typing.Literal else ()
