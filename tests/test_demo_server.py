"""The demo's server, asked over raw sockets: what it answers and what it refuses."""

import random

import pytest
from demo_client import SMALL, demo, get, host, post, raw, server

__all__ = ["demo", "server"]  # fixtures


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
        body = b" " * (SMALL.body + more)
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
