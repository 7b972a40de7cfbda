"""The demo's server and its clients: slow, many, gone, in the way of each other; and its end."""

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from demo_client import (
    QUICK,
    SMALL,
    Answer,
    connect,
    demo,
    get,
    host,
    post,
    raw,
    received,
    request,
    server,
    serving,
)

from trm_fast.demo import command

__all__ = ["demo", "server"]  # fixtures


def until_there_is_a_place(server):
    until = time.monotonic() + QUICK
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionError, IndexError):
            if get(server, "/").status == 200:
                return
    pytest.fail("no place became free")


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
    held = [connect(server) for _ in range(SMALL.connections)]
    try:
        with connect(server) as connection:
            answer = Answer(received(connection))
        assert (answer.status, answer.body) == (503, "busy\n")
        assert answer.headers["retry-after"] == "1"
    finally:
        for connection in held:
            connection.close()
    until_there_is_a_place(server)


LINGERS = replace(SMALL, linger=60.0, rest=1 << 18)


def test_a_client_that_was_refused_early_may_send_to_the_end_and_reads_why(demo):
    most = LINGERS.body
    with serving(demo, LINGERS) as server, connect(server) as connection:
        data = request(server, "/api/puzzle", b" " * (most + 70_000))
        connection.sendall(data[:1000])
        assert select.select([connection], [], [], QUICK)[0], "refused by the headers alone"
        for start in range(1000, len(data), 1 << 14):
            connection.sendall(data[start : start + (1 << 14)])
        answer = Answer(b"".join(iter(lambda: connection.recv(1 << 16), b"")))  # and no reset
    assert answer.status == 413
    assert answer.body == f"a body of {most + 70_000} bytes; at most {most} are allowed\n"


def test_a_client_that_sends_without_end_is_cut_off(demo):
    """After `rest` bytes; what more goes out stands in the buffers of the two sockets."""
    with serving(demo, LINGERS) as server, connect(server) as connection:
        connection.sendall(request(server, "/api/puzzle", b" " * (LINGERS.body + 1))[:1000])
        with pytest.raises(ConnectionError):
            for _ in range(64):
                connection.sendall(b" " * (1 << 20))


def test_a_client_that_was_answered_and_stays_is_let_go(demo):
    with (
        serving(demo, replace(SMALL, connections=1)) as server,
        connect(server) as stays,
    ):
        stays.sendall(f"GET / HTTP/1.1\r\n{host(server)}\r\n".encode())
        assert Answer(received(stays)).status == 200
        until_there_is_a_place(server)


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
