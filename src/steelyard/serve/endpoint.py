"""A route as the table has it: its handler, who may call it, what it takes and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from steelyard.serve.auth import Permission
from steelyard.serve.protocol.fields import Fields
from steelyard.serve.protocol.parameters import Parameter, Schema


@dataclass(frozen=True)
class Form:
    """A body that is a form, multipart/form-data."""

    schema: Schema


@dataclass(frozen=True)
class Endpoint:
    """A route, and the scope that a key needs for it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[..., Any]
    permission: Permission | None
    """None: public."""
    answer: Any
    """What the body of a 200 is: a struct; or the media type of one that is no JSON."""
    takes: type[Fields] | Form | tuple[Parameter, ...] = ()
    """The body; or, where there is none, parameters of the query, and those of the path that are more than a name."""
    events: Any = None
    """What an event is, where a stream can be asked for: a struct, or one of several."""
    media: tuple[str, ...] = ()
    """Media types of answers that are texts, where they can be asked for."""
    statuses: tuple[int, ...] = (200,)
    """Those that have this answer."""
