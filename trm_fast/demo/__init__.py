"""The demo: a local page on which one watches a model think. `trm-fast demo`.

Reading order: `work` turns what a page asks into puzzles and frames, `server` speaks HTTP to
loopback and trusts nobody there, `command` is the command. The page itself, plain HTML, CSS and
JavaScript without any build step, is in `page/`.
"""
