"""HTTP for the demo: to loopback only, for one page, trusting nobody.

Owns the limits of a connection and of concurrent work, the checks of a request, and the headers of
an answer. Imported by the command.

A page of another site, open in the same browser, can send requests to loopback: the Host must be
ours (DNS rebinding), a POST must be JSON (other sites cannot send that without being asked for
their Origin) and of our own Origin. Files are served from a table that is read once: no path is
ever opened. Whatever is refused is a status from 400 on and one line of text. An answer is a line
of JSON per frame; a client that goes away ends the work before the next step.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from trm_fast import __version__
from trm_fast.console import say
from trm_fast.demo.work import Demo, RequestError, parse_request
from trm_fast.options import printable

__all__ = ["DemoServer", "Limits", "serve"]

LOOPBACK = "127.0.0.1"
NO_HTTP = "this is no request of HTTP/1.0 or HTTP/1.1"
TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # Nothing but our own files; what they draw is set by script, not by inline styles.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """Most that clients may take; seconds where nothing else is said.

    Attributes:
        connections: open at a time.  solving, puzzles: requests of each sort worked on at a time.
        body: bytes of a request's body.
        request: until a request has come in whole.  send: until a client has taken what it is
            sent.  wait: that a request waits for another's work to end, before it is refused.
        linger: that a client which was answered may go on sending.  rest: bytes of that.
    """

    connections: int = 32
    solving: int = 1
    puzzles: int = 2
    body: int = 1 << 16
    request: float = 10.0
    send: float = 20.0
    wait: float = 3.0
    linger: float = 0.5
    rest: int = 1 << 20


class _Refused(Exception):
    """Ends a request: a status, one line, and more headers."""

    def __init__(self, status: int, line: str, **headers: str) -> None:
        super().__init__(line)
        self.status, self.line = status, printable(" ".join(line.split()))[:500]
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Timed(io.RawIOBase):
    """A socket to read from until a moment: a client that sends a byte now and then ends, too."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until = connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class DemoServer(ThreadingHTTPServer):
    """The server, bound when it is made; `serve_forever` runs it.

    Args:
        demo: what it serves.  port: 0 is any that is free.  limits: of its clients.

    Attributes:
        stopping: set, it ends all work before the next step.

    Raises:
        OSError: the port is taken, or not to be had.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, demo: Demo, port: int = 0, limits: Limits | None = None) -> None:
        self.demo, self.limits = demo, limits or Limits()
        self.stopping = threading.Event()
        self.slots = {
            "solve": threading.BoundedSemaphore(self.limits.solving),
            "puzzle": threading.BoundedSemaphore(self.limits.puzzles),
        }
        self._places = threading.BoundedSemaphore(self.limits.connections)
        self.pages = {f"/{name}": content for name, content in _pages()}
        self.pages["/"] = self.pages["/index.html"]
        super().__init__((LOOPBACK, port), _Handler)
        names = [f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}"]
        self.hosts = {*names, *((LOOPBACK, "localhost") if self.server_port == 80 else ())}

    def server_bind(self) -> None:
        """As the base class of the base class, which looks no name up."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, if there are not too many."""
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0.2)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\nbusy\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class; the place of the connection is free again at its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go; anything else is said on one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            say(f"trm-fast demo: {type(error).__name__}: {printable(str(error))}", err=True)

    def drain(self, seconds: float) -> None:
        """Have running work end, and wait for it so long at most."""
        self.stopping.set()
        until = time.monotonic() + seconds
        places = {"solve": self.limits.solving, "puzzle": self.limits.puzzles}
        for name, count in places.items():
            for _ in range(count):
                if not self.slots[name].acquire(timeout=max(0.0, until - time.monotonic())):
                    say(f"trm-fast demo: work goes on after {seconds:g} seconds", err=True)
                    return


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer

    def version_string(self) -> str:
        """What stands in the header Server."""
        return f"trm_fast/{__version__}"

    def setup(self) -> None:
        super().setup()
        until = time.monotonic() + self.server.limits.request
        self.rfile = io.BufferedReader(_Timed(self.connection, until))
        self._begun = False

    def handle(self) -> None:
        """One request: connections are not kept, so that none is waited on."""
        try:
            self.raw_requestline = self.rfile.readline(8193)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 8192:
                self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
                self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            elif self.parse_request():
                self._answered()
            elif not self._begun:  # an empty line
                self.send_error(HTTPStatus.BAD_REQUEST)
        except TimeoutError:
            self._late()
        except ConnectionError:
            return
        self._linger()

    def _answered(self) -> None:
        try:
            self._route()
        except _Refused as refused:
            self._refuse(refused)
        except RequestError as error:
            self._refuse(_Refused(400, str(error)))
        except (TimeoutError, ConnectionError):
            raise
        except Exception as error:  # a mistake of ours: the next request is answered all the same
            said = f"{type(error).__name__}: {printable(str(error))[:300]}"
            say(f"trm-fast demo: {self.command} {printable(self.path)[:80]}: {said}", err=True)
            self._refuse(_Refused(500, f"the server made a mistake: {said}"))

    def _route(self) -> None:
        if self.request_version == "HTTP/0.9":
            raise _Refused(400, NO_HTTP)
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].strip().lower() not in self.server.hosts:
            raise _Refused(421, f"this is {self.server.url}, another host was asked for")
        path = self.path.partition("?")[0]
        posts: dict[str, Callable[[dict[str, Any]], None]] = {
            "/api/puzzle": self._puzzle,
            "/api/solve": self._solve,
        }
        known = path in self.server.pages or path == "/api/models"
        if path not in posts and not known:
            raise _Refused(404, "there is nothing of that name")
        allowed = ("POST",) if path in posts else ("GET", "HEAD")
        if self.command not in allowed:
            raise _Refused(405, f"{path} takes {' and '.join(allowed)}", Allow=", ".join(allowed))
        if path in posts:
            asked = self._body()
            posts[path](asked)
        elif path in self.server.pages:
            self._send(200, *self.server.pages[path])
        else:
            self._send_json(self.server.demo.models())

    def _body(self) -> dict[str, Any]:
        """The object that a POST brings; nothing is read before its headers are right."""
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{h}" for h in self.server.hosts}:
            raise _Refused(403, "requests of other sites are not answered")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise _Refused(403, "requests of other sites are not answered")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "a body of application/json is needed")
        lengths = self.headers.get_all("Content-Length") or []
        if self.headers.get("Transfer-Encoding") is not None or len(lengths) != 1:
            raise _Refused(411, "one Content-Length is needed, and no Transfer-Encoding")
        if not re.fullmatch("[0-9]{1,12}", lengths[0].strip()):
            raise _Refused(400, "Content-Length is no number")
        length, most = int(lengths[0]), self.server.limits.body
        if length > most:
            raise _Refused(413, f"a body of {length} bytes; at most {most} are allowed")
        data = self.rfile.read(length)
        if len(data) < length:
            raise _Refused(400, f"the body ends after {len(data)} of {length} bytes")
        return parse_request(data)

    def _puzzle(self, asked: dict[str, Any]) -> None:
        with self._slot("puzzle", "puzzles are being made"):
            self._send_json(self.server.demo.puzzle(asked))

    def _solve(self, asked: dict[str, Any]) -> None:
        with (
            self._slot("solve", "a puzzle is being worked on"),
            contextlib.closing(self.server.demo.frames(asked)) as lines,
        ):
            first = next(lines)  # what is wrong with the question shows here
            self._head(200, "application/x-ndjson; charset=utf-8")
            self.connection.settimeout(self.server.limits.send)
            self._line(first)
            try:
                for line in lines:
                    if self._gone():
                        return
                    if self.server.stopping.is_set():
                        self._line({"error": "the server is ending"})
                        return
                    self._line(line)
            except (TimeoutError, ConnectionError):
                raise
            except Exception as error:  # mid-way, after a status was sent
                said = f"{type(error).__name__}: {printable(str(error))[:300]}"
                say(f"trm-fast demo: {said}", err=True)
                self._line({"error": said})

    @contextlib.contextmanager
    def _slot(self, name: str, why: str) -> Iterator[None]:
        slot, limits = self.server.slots[name], self.server.limits
        if not slot.acquire(timeout=limits.wait):
            raise _Refused(503, f"busy: {why}; try again in a moment", Retry_After="1")
        try:
            yield
        finally:
            slot.release()

    def _gone(self) -> bool:
        """Whether the client has gone. One that only sends no more still gets its answer; that it
        has closed both sides shows when something is sent to it."""
        try:
            poll = select.poll()
            poll.register(self.connection, 0)
            return bool(poll.poll(0))  # POLLERR and POLLHUP are always told
        except (OSError, ValueError):
            return True

    def _line(self, value: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send(200, "application/json; charset=utf-8", json.dumps(value).encode())

    def _send(self, status: int, kind: str, content: bytes, **headers: str) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **headers})
        self.connection.settimeout(self.server.limits.send)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, kind: str, more: dict[str, str] | None = None) -> None:
        self._begun = True
        self.request_version = "HTTP/1.0"  # of 0.9 headers would be left out
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _refuse(self, refused: _Refused) -> None:
        if not self._begun:
            text = "text/plain; charset=utf-8"
            self._send(refused.status, text, refused.line.encode() + b"\n", **refused.headers)

    def _late(self) -> None:
        """The client was too slow: told so if it waits for an answer."""
        self.request_version, self.command = "HTTP/1.0", ""
        self.requestline = getattr(self, "requestline", "")
        with contextlib.suppress(OSError):
            seconds = self.server.limits.request
            self._refuse(_Refused(408, f"the request did not come in {seconds:g} seconds"))

    def _linger(self) -> None:
        """Take what the client still sends, a little: closing at once would lose our answer."""
        limits = self.server.limits
        with contextlib.suppress(OSError, ValueError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + limits.linger
            taken = 0
            while taken < limits.rest and (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                part = self.connection.recv(1 << 16)
                if not part:
                    return
                taken += len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, as one line."""
        status = 400 if code in (501, 505) else int(code)
        line = NO_HTTP if status == 400 else HTTPStatus(code).phrase
        with contextlib.suppress(ConnectionError):
            self.requestline = getattr(self, "requestline", "")
            self.command = getattr(self, "command", None) or ""
            self._refuse(_Refused(status, line))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _pages() -> Iterator[tuple[str, tuple[str, bytes]]]:
    """(name, (type, content)) of the files of the page."""
    for entry in (files("trm_fast.demo") / "page").iterdir():
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if kind and entry.is_file():
            yield entry.name, (kind, entry.read_bytes())


def serve(server: DemoServer) -> None:
    """Run until Ctrl-C; work in progress is ended, and the port free again."""
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        server.drain(5.0)
