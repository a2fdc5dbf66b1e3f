"""A real HTTP server on 127.0.0.1 for the download tests: byte ranges or not, and connections that break off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Content:
    """What a path answers. `break_at`: sizes after which the next answers break off, one each."""

    body: bytes
    type: str = "application/octet-stream"
    ranges: bool = True
    status: int = 200
    break_at: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FileServer:
    url: str
    files: dict[str, Content]
    asked: list[tuple[str, dict[str, str]]]


@contextmanager
def serving(files: dict[str, Content] | None = None) -> Iterator[FileServer]:
    contents = {} if files is None else files
    asked: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append((path, {key.lower(): value for key, value in self.headers.items()}))
            content = contents.get(path)
            if content is None:
                self.send_error(404)
                return
            body, status, extra = content.body, content.status, dict(content.headers)
            wanted = self.headers.get("Range", "")
            if wanted and content.ranges:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                if start >= len(body):
                    self.send_error(416)
                    return
                extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
            self.send_response(status)
            self.send_header("Content-Type", content.type)
            self.send_header("Content-Length", str(len(body)))
            for key, value in extra.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if content.break_at:
                self.wfile.write(body[: content.break_at.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield FileServer(f"http://127.0.0.1:{server.server_port}", contents, asked)
    finally:
        server.shutdown()
        server.server_close()
