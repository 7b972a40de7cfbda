"""A client of the demo's server over raw sockets, and a demo that answers as it is told to."""

import contextlib
import json
import socket
import threading
import time

import pytest

from trm_fast.demo.server import DemoServer, Limits
from trm_fast.demo.work import RequestError

QUICK = 5.0  # seconds that nothing here comes near
SMALL = Limits(connections=4, request=0.4, send=0.4, wait=0.1)


class FakeDemo:
    """Answers as it is told to, and tells what became of its work."""

    def __init__(self):
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)
        self.go = threading.Event()
        self.made = 0

    def models(self):
        return {"models": []}

    def puzzle(self, asked):
        if asked.get("wrong"):
            raise RequestError("puzzle: 3 characters\nand more")
        if asked.get("mistake"):
            raise ZeroDivisionError("of ours\n")
        return {"line": asked["text"]}

    def frames(self, asked):
        if asked.get("wrong"):
            raise RequestError("rollouts is 0")
        self.begun.release()
        try:
            yield {"start": 1}
            for number in range(asked.get("frames", 2)):
                if asked.get("waits"):
                    assert self.go.wait(QUICK)
                if asked.get("mistake"):
                    raise ZeroDivisionError("of ours")
                self.made += 1
                yield {"frame": number, "more": "x" * asked.get("size", 0)}
                time.sleep(asked.get("pause", 0))
            yield {"answer": 1}
        finally:
            self.ended.release()


@contextlib.contextmanager
def serving(demo, limits=SMALL):
    """The server of a FakeDemo, running."""
    with DemoServer(demo, 0, limits) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            demo.go.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def demo():
    return FakeDemo()


@pytest.fixture
def server(demo):
    with serving(demo) as server:
        yield server


class Answer:
    def __init__(self, data: bytes):
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        pairs = (line.split(": ", 1) for line in lines[1:])
        self.headers = {name.lower(): value for name, value in pairs}
        self.body = body.decode()

    def lines(self):
        return [json.loads(line) for line in self.body.splitlines()]


def connect(server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.server_port))
    connection.settimeout(QUICK)
    return connection


def received(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def raw(server, data: bytes) -> Answer:
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return Answer(received(connection))


def host(server) -> str:
    return f"Host: 127.0.0.1:{server.server_port}\r\n"


def get(server, path, method="GET", more="") -> Answer:
    return raw(server, f"{method} {path} HTTP/1.1\r\n{host(server)}{more}\r\n".encode())


def request(server, path, asked, more="", kind="application/json") -> bytes:
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\n{host(server)}Content-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def post(server, path, asked, more="", kind="application/json") -> Answer:
    return raw(server, request(server, path, asked, more, kind))
