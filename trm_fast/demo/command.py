"""The command `demo`: a local page on which one watches a model think.

Owns its options and which models it serves. Imported by `__main__.py` only.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Sequence

from trm_fast.config import QUANTIZED
from trm_fast.console import say, show_builds
from trm_fast.demo.server import LOOPBACK, DemoServer, serve
from trm_fast.demo.work import Demo, RequestError, check_drawn
from trm_fast.loading import MODEL, USAGE, CommandError, Loaded, Parser, load_or_stop
from trm_fast.pretrained import SHIPPED, WEIGHTS
from trm_fast.solve import RUNS, newest_run

__all__ = ["main"]

PORT = 8377


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C. Returns 0, or the status of `Parser`."""
    show_builds()
    try:
        options = _parser().parse_args(argv)
        demo = Demo(_models(options))
        server = _bound(demo, options.port)
    except RequestError as error:
        say(f"trm-fast demo: {error}", err=True)
        return MODEL
    except CommandError as error:
        say(f"trm-fast demo: {error}", err=True)
        return error.status
    for one in demo.served:
        say(f"{one.kind}: {one.loaded.folder} ({one.loaded.weights} weights)")
    say(f"open {server.url} in a browser of this machine; Ctrl-C ends it")
    serve(server)
    say("ended")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "trm-fast demo",
        "A page for a browser on this machine: type or paste a Sudoku, take a maze or an ARC\n"
        "task, and watch every rollout of a model fill its board step by step. Nothing but this\n"
        "machine can reach it.",
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="CHECKPOINT",
        action="append",
        help="a run folder, RUN/last, RUN/best or RUN/step_N; again for more models (default: "
        f"newest in ./{RUNS}, and `{SHIPPED}`, the model that comes with the package)",
    )
    parser.add_argument(
        "-p", "--port", type=_port, default=PORT, help=f"0 is any that is free (default: {PORT})"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="moving average or raw weights (default: ema where the run kept it)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_threads()
    parser.add_argument(
        "--quantize", choices=QUANTIZED, help="products in 8 bits (default: the run's own)"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)


def _models(options: argparse.Namespace) -> list[Loaded]:
    if options.model:
        return [load_or_stop(path, options) for path in options.model]
    loaded = []
    newest = newest_run()
    if newest is not None:
        try:
            one = load_or_stop(newest, options)
            check_drawn(one)
            loaded.append(one)
        except (CommandError, RequestError) as error:  # the page is of use without it
            if isinstance(error, CommandError) and error.status != MODEL:
                raise
            say(f"note: left out: {error}", err=True)
    return [*loaded, load_or_stop(SHIPPED, options)]


def _bound(demo: Demo, port: int) -> DemoServer:
    try:
        return DemoServer(demo, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is in use" if taken else f"cannot be had ({error.strerror or error})"
        more = "; --port 0 takes one that is free" if taken else ""
        raise CommandError(USAGE, f"port {port} of {LOOPBACK} {why}{more}") from None
