"""The demo's server, asked over raw sockets: what it answers, what it refuses, what it survives."""

import contextlib
import json
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from trm_fast.demo import command
from trm_fast.demo.server import DemoServer, Limits
from trm_fast.demo.work import RequestError

QUICK = 5.0  # seconds that nothing here comes near


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


class Small(Limits):
    connections = 4
    request = 0.4
    send = 0.4
    wait = 0.1


@pytest.fixture
def demo():
    return FakeDemo()


@pytest.fixture
def server(demo):
    with DemoServer(demo, 0, Small) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        demo.go.set()
        server.shutdown()
        thread.join()


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


def test_it_is_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize(
    ("path", "kind", "holds"),
    [
        ("/", "text/html; charset=utf-8", '<script type="module" src="/app.js">'),
        ("/index.html", "text/html; charset=utf-8", "<!doctype html>"),
        ("/app.js?x=1", "text/javascript; charset=utf-8", "import * as api"),
        ("/style.css", "text/css; charset=utf-8", "prefers-color-scheme: dark"),
        ("/icon.svg", "image/svg+xml", "<svg"),
        ("/api/models", "application/json; charset=utf-8", '{"models": []}'),
    ],
)
def test_pages(server, path, kind, holds):
    answer = get(server, path)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert holds in answer.body
    assert int(answer.headers["content-length"]) == len(answer.body.encode())
    head = get(server, path, "HEAD")
    assert (head.status, head.body) == (200, "")
    assert head.headers["content-length"] == answer.headers["content-length"]


def test_every_answer_has_the_headers_that_keep_a_page_apart(server):
    for answer in (get(server, "/"), get(server, "/nothing"), raw(server, b"\r\n\r\n")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["server"].startswith("trm_fast/")
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_code(server):
    names = [name for name in server.pages if name != "/"]
    assert {"/app.js", "/board.js", "/chart.js", "/index.html", "/style.css"} <= set(names)
    for name in names:
        text = server.pages[name][1].decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, name
        assert len(text.splitlines()) <= 500
    page = server.pages["/"][1].decode()
    assert "style=" not in page and "onclick" not in page and page.count("<script") == 1


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2fserver.py",
        "/page/app.js",
        "/app.js/",
        "/app.js%00",
        "/__init__.py",
        "/api/",
        "http://127.0.0.1/",
        "*",
    ],
)
def test_there_are_no_other_paths(server, path):
    answer = get(server, path)
    assert (answer.status, answer.body) == (404, "there is nothing of that name\n")


@pytest.mark.parametrize(
    "line",
    [
        "Host: evil.example",
        "Host: evil.example:{port}",
        "Host: 127.0.0.1",
        "Host: 127.0.0.1:1",
        "Host: 127.0.0.1:{port}.evil.example",
        "Host: ",
        "X-Host: 127.0.0.1:{port}",
        "Host: 127.0.0.1:{port}\r\nHost: 127.0.0.1:{port}",
        "Host: [::1]:{port}",
    ],
)
def test_another_host_is_refused(server, line):
    head = "GET / HTTP/1.1\r\n" + line.format(port=server.server_port) + "\r\n\r\n"
    answer = raw(server, head.encode())
    assert answer.status == 421
    assert answer.body == f"this is {server.url}, another host was asked for\n"


def test_localhost_is_the_same(server):
    head = f"GET / HTTP/1.1\r\nHost: LOCALHOST:{server.server_port}\r\n\r\n".encode()
    assert raw(server, head).status == 200


@pytest.mark.parametrize(
    ("more", "kind", "status"),
    [
        ("Origin: http://evil.example\r\n", "application/json", 403),
        ("Origin: null\r\n", "application/json", 403),
        ("Origin: https://127.0.0.1:{port}\r\n", "application/json", 403),
        ("Sec-Fetch-Site: cross-site\r\n", "application/json", 403),
        ("Sec-Fetch-Site: same-site\r\n", "application/json", 403),
        ("", "text/plain", 415),
        ("", "application/x-www-form-urlencoded", 415),
        ("Transfer-Encoding: chunked\r\n", "application/json", 411),
        ("Content-Length: 5\r\n", "application/json", 411),
        ("Origin: http://127.0.0.1:{port}\r\n", "application/json", 200),
        ("Sec-Fetch-Site: same-origin\r\n", "application/json; charset=utf-8", 200),
    ],
)
def test_posts_of_other_sites_are_refused(server, more, kind, status):
    more = more.format(port=server.server_port)
    answer = post(server, "/api/puzzle", {"text": "x"}, more, kind)
    assert answer.status == status
    assert answer.body.count("\n") == (status != 200)


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/api/solve", 405, "POST"),
        ("POST", "/", 405, "GET, HEAD"),
        ("DELETE", "/api/models", 405, "GET, HEAD"),
        ("OPTIONS", "/api/solve", 405, "POST"),
        ("BREW", "/style.css", 405, "GET, HEAD"),
    ],
)
def test_methods(server, method, path, status, allowed):
    answer = get(server, path, method)
    assert (answer.status, answer.headers["allow"]) == (status, allowed)
    assert answer.body == f"{path} takes {allowed.replace(', ', ' and ')}\n"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b'"x"', b"\xff\xfe", b"[" * 60_000, b'{"a": NaN}', b"1" * 10_000],
    ids=lambda body: repr(body[:8]),
)
def test_bodies_that_are_no_object(server, body):
    answer = post(server, "/api/solve", body)
    assert answer.status == 400
    assert answer.body in ("the body is no JSON\n", "the body must be a JSON object\n")


def test_a_body_that_is_too_long_is_refused_without_being_read(server):
    for more in (10_000, 5_000_000):
        body = b" " * (Limits.body + more)
        answer = post(server, "/api/puzzle", body)
        assert answer.status == 413
        assert answer.body == f"a body of {len(body)} bytes; at most 65536 are allowed\n"


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "９", "9" * 40, ""])
def test_a_length_that_is_no_number(server, length):
    head = f"POST /api/puzzle HTTP/1.1\r\n{host(server)}Content-Type: application/json\r\n"
    answer = raw(server, f"{head}Content-Length: {length}\r\n\r\n{{}}".encode())
    assert (answer.status, answer.body) == (400, "Content-Length is no number\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\0" * 50 + b"\n", 400),
        (b"\xff\xfe / HTTP/1.1\r\n\r\n", 421),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_request(server, data, status):
    answer = raw(server, data)
    assert answer.status == status
    assert answer.body.count("\n") == 1 and "Traceback" not in answer.body


def test_garbage_is_survived(server, capsys):
    draw = random.Random(4711)
    for _ in range(60):
        data = draw.randbytes(draw.randrange(1, 400)) + b"\n\r\n\r\n"
        assert 400 <= raw(server, data).status < 500
    assert get(server, "/").status == 200
    assert capsys.readouterr() == ("", "")


def test_a_request_that_stops_midway_is_told_so(server):
    half = request(server, "/api/puzzle", {"text": "x"})[:-4]
    for data in (b"GET / HT", b"GET / HTTP/1.1\r\nHos", half):
        answer = raw(server, data)
        late = "the request did not come in 0.4 seconds\n"
        assert (answer.status, answer.body) == (408, late)
    with connect(server) as connection:
        connection.sendall(half)
        connection.shutdown(socket.SHUT_WR)
        answer = Answer(received(connection))
    assert answer.status == 400 and answer.body.startswith("the body ends after ")


def test_a_client_that_sends_a_byte_now_and_then_ends_too(server):
    with connect(server) as connection:
        begun = time.monotonic()
        for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 1000:
            try:
                connection.sendall(bytes([byte]))
            except ConnectionError:
                break
            if select.select([connection], [], [], 0.05)[0]:
                break
        assert time.monotonic() - begun < QUICK
        assert Answer(received(connection)).status == 408


def test_too_many_connections_are_turned_away(server):
    held = [connect(server) for _ in range(Small.connections)]
    try:
        with connect(server) as connection:
            answer = Answer(received(connection))
        assert (answer.status, answer.body) == (503, "busy\n")
        assert answer.headers["retry-after"] == "1"
    finally:
        for connection in held:
            connection.close()
    until = time.monotonic() + QUICK
    while time.monotonic() < until:  # the places are free again
        with contextlib.suppress(ConnectionError, IndexError):
            if get(server, "/").status == 200:
                return
    pytest.fail("no place became free")


def test_frames_come_as_lines(server, demo):
    answer = post(server, "/api/solve", {"frames": 2})
    kind = answer.headers["content-type"]
    assert (answer.status, kind) == (200, "application/x-ndjson; charset=utf-8")
    frames = [{"frame": number, "more": ""} for number in range(2)]
    assert answer.lines() == [{"start": 1}, *frames, {"answer": 1}]


def test_a_frame_is_sent_when_it_is_there(server, demo):
    with connect(server) as connection:
        connection.sendall(request(server, "/api/solve", {"waits": True}))
        data = b""
        while b'{"start":1}\n' not in data:
            data += connection.recv(1 << 16)
        assert b'{"frame"' not in data
        demo.go.set()
        assert b'{"answer":1}\n' in received(connection)


@pytest.mark.parametrize("path", ["/api/solve", "/api/puzzle"])
def test_what_cannot_be_done_is_one_line(server, path):
    answer = post(server, path, {"wrong": 1})
    assert answer.status == 400
    said = {"/api/solve": "rollouts is 0", "/api/puzzle": "puzzle: 3 characters and more"}
    assert answer.body == said[path] + "\n"


def test_our_own_mistakes_end_one_request(server, capsys):
    answer = post(server, "/api/puzzle", {"mistake": 1})
    assert answer.status == 500
    assert answer.body == "the server made a mistake: ZeroDivisionError: of ours?\n"
    answer = post(server, "/api/solve", {"mistake": 1})
    assert answer.status == 200
    assert answer.lines()[1:] == [{"error": "ZeroDivisionError: of ours"}]
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "trm-fast demo: POST /api/puzzle: ZeroDivisionError: of ours?",
        "trm-fast demo: ZeroDivisionError: of ours",
    ]
    assert get(server, "/").status == 200


def test_a_second_puzzle_is_busy_while_the_first_is_worked_on(server, demo):
    with connect(server) as first:
        first.sendall(request(server, "/api/solve", {"waits": True}))
        assert demo.begun.acquire(timeout=QUICK)
        answer = post(server, "/api/solve", {})
        assert answer.status == 503
        assert answer.body == "busy: a puzzle is being worked on; try again in a moment\n"
        assert answer.headers["retry-after"] == "1"
        assert post(server, "/api/puzzle", {"text": "x"}).status == 200
        demo.go.set()
        assert b'{"answer":1}' in received(first)
    assert post(server, "/api/solve", {}).lines()[-1] == {"answer": 1}


def test_a_client_that_goes_away_ends_the_work(server, demo):
    connection = connect(server)
    connection.sendall(request(server, "/api/solve", {"frames": 100_000, "pause": 0.005}))
    assert demo.begun.acquire(timeout=QUICK)
    connection.close()
    assert demo.ended.acquire(timeout=QUICK)
    assert demo.made < 1000
    assert post(server, "/api/solve", {"frames": 1}).status == 200


def test_that_a_client_is_gone_is_seen_soon_after_something_was_sent(server, demo):
    connection = connect(server)
    connection.sendall(request(server, "/api/solve", {"frames": 100, "waits": True}))
    data = b""
    while b'{"start":1}\n' not in data:
        data += connection.recv(1 << 16)
    connection.close()
    demo.go.set()
    assert demo.ended.acquire(timeout=QUICK)
    assert demo.made <= 5


def test_a_client_that_sends_no_more_gets_its_whole_answer(server, demo):
    with connect(server) as connection:
        connection.sendall(request(server, "/api/solve", {"frames": 20}))
        connection.shutdown(socket.SHUT_WR)
        assert len(Answer(received(connection)).lines()) == 22


def test_a_client_that_does_not_read_ends_the_work(server, demo):
    with connect(server) as connection:
        connection.sendall(request(server, "/api/solve", {"frames": 10_000, "size": 1 << 20}))
        assert demo.ended.acquire(timeout=QUICK)
    assert demo.made < 1000


def test_stopping_ends_the_work(server, demo):
    with connect(server) as connection:
        connection.sendall(request(server, "/api/solve", {"frames": 10**9}))
        assert demo.begun.acquire(timeout=QUICK)
        server.drain(QUICK)
        assert demo.ended.acquire(blocking=False), "work went on"
        last = received(connection).rstrip().rsplit(b"\n", 1)[1]
    assert json.loads(last) == {"error": "the server is ending"}


def test_a_port_that_is_taken_is_one_line(server, capsys):
    port = server.server_port
    assert command.main(["--port", str(port), "--model", "shipped"]) == 2
    want = f"port {port} of 127.0.0.1 is in use; --port 0 takes one that is free"
    assert capsys.readouterr() == ("", f"trm-fast demo: {want}\n")


def test_ctrl_c_ends_the_command_and_frees_the_port():
    words = [sys.executable, "-m", "trm_fast.demo", "--port", "0", "--model", "shipped"]
    # A shell's job in the background ignores it otherwise.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, preexec_fn=heed, **pipes) as process:
        try:
            first, line = process.stdout.readline(), process.stdout.readline()
            assert first.startswith("sudoku: ") and first.endswith("shipped (ema weights)\n")
            port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), QUICK) as connection:
                connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                assert Answer(received(connection)).status == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (out, err, process.returncode) == ("ended\n", "", 0)
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port), QUICK)
