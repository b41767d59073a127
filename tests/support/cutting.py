"""A proxy in front of a real server that cuts the connection at a chosen request."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Cut = Literal["request", "reply"]


class CuttingProxy:
    """Forwards HTTP requests; ``cut`` returns for a request number the lost part, if any.

    A lost request never came to the server; what a lost reply answers to was done.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.cut: Callable[[int], Cut | None] = lambda number: None
        self.requests: list[str] = []
        proxy, counting = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with counting:
                    cut = proxy.cut(len(proxy.requests))
                    proxy.requests.append(f"{self.command} {self.path.partition('?')[0]}")
                self.close_connection = True
                if cut == "request":
                    return
                there = http.client.HTTPConnection(*target)
                there.request(self.command, self.path, body, dict(self.headers))
                reply = there.getresponse()
                data = reply.read()
                there.close()
                if cut == "reply":
                    return
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                        self.send_header(name, value)
                length = reply.headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
