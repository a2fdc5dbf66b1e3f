"""Whether OpenTelemetry is told of requests: the standard variables of the environment say so.

Without them nothing of it is imported. What it is told, and how, is in `spans.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from steelyard.errors import ConfigError

if TYPE_CHECKING:
    from steelyard.serve.spans import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


def open_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """What spans are sent with; None where no endpoint is named, or OpenTelemetry is turned off.

    Args:
        environment: says whether. How (headers, time-outs, sampling) is read from the process's own by the SDK.

    Raises:
        ConfigError: a setting that cannot be honoured, or the extra `otel` is not installed.
    """
    named = next((name for name in ENDPOINTS if environment.get(name)), None)
    exporter = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if named is None or exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER is '{exporter[:40]}': spans are exported by 'otlp', or by 'none'")
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        raise ConfigError(f"the OTLP protocol is '{protocol[:40]}': spans are sent by '{PROTOCOL}' alone")
    try:
        from steelyard.serve.spans import Tracing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{named} is set, but {error.name} is not installed: pip install 'steelyard[otel]', or unset it"
        ) from None
    try:
        return Tracing()
    except ValueError as error:
        raise ConfigError(f"OpenTelemetry refuses a setting of the environment: {error}") from None
