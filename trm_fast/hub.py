"""The Hugging Face hub: files fetched from it, a folder sent to it, the model card.

Owns every call of huggingface_hub, which the extra `trm-fast[hub]` installs and which is imported
at the first call. Imported by `pretrained.py`. File names follow PyTorchModelHubMixin: config.json
and model.safetensors, with README.md as the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trm_fast import __version__
from trm_fast.durable import CheckpointError, one_line

__all__ = ["SCHEME", "Card", "download", "fetch", "hub_id", "list_files", "model_card", "upload"]

SCHEME = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Card:
    """What a model card says beyond the network; None or empty: not recorded.

    Attributes:
        data: what it was trained on.  command: the command line that trained it.
        metrics: name -> value, as measured.  license: an identifier of the hub, such as mit.
    """

    data: str | None = None
    command: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None


def hub_id(text: str, *, bare: bool) -> str | None:
    """The "owner/name" that a text means: behind hf://, or with `bare` by itself; else None."""
    name = text.removeprefix(SCHEME)
    if _ID.fullmatch(name) and (bare or text != name):
        return name
    if text != name:
        raise CheckpointError(f"{text}: not of the form hf://owner/name")
    return None


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise CheckpointError(
            f"{purpose}: needs huggingface_hub (pip install 'trm-fast[hub]')"
        ) from None
    return huggingface_hub


def _failures(library: Any) -> tuple[type[Exception], ...]:
    """What its calls raise: its own errors, and those of the HTTP library below it, which is
    another one in each of its versions; theirs have a common base, which its own derives from."""
    own = library.errors.HfHubHTTPError.__mro__
    below = [kind for kind in own if kind.__name__ in ("HTTPError", "RequestException")]
    return (OSError, ValueError, *below)


def fetch(
    repo: str, file: str, revision: str | None = None, *, optional: bool = False
) -> Path | None:
    """The local copy of one file of a repository; None where the repository has no such file.

    With `optional` None also where nobody can tell: it is not in the cache, and no network.

    Raises CheckpointError: the library is not installed, or no such repository, or no network.
    """
    library = _library(repo)
    try:
        return Path(library.hf_hub_download(repo, file, revision=revision))
    except library.errors.LocalEntryNotFoundError as error:
        if optional:
            return None
        raise CheckpointError(
            f"{repo}: {file} is not in the local cache, and the hub cannot be reached "
            f"({one_line(error)})"
        ) from None
    except library.errors.EntryNotFoundError:
        return None
    except _failures(library) as error:
        raise CheckpointError(f"{repo}: {file} cannot be fetched: {one_line(error)}") from None


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """As `fetch`; CheckpointError, with the names there are, for a file that is not there."""
    path = fetch(repo, file, revision)
    if path is not None:
        return path
    names = ", ".join(list_files(repo, revision)[:8])
    raise CheckpointError(f"{repo}: has no {file}; name one of its files: {names}")


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """The names of a repository's files; empty where that cannot be had."""
    library = _library(repo)
    try:
        return sorted(library.list_repo_files(repo, revision=revision))
    except _failures(library):
        return []


def upload(
    folder: Path, repo: str, *, private: bool, message: str, owned: Sequence[str] = ()
) -> str:
    """Make the repository if it is not there, send the folder, and return its address.

    Args:
        owned: files that go where the folder has none of them.

    Raises CheckpointError: the library is not installed, no permission, no network.
    """
    library = _library(f"sending to {repo}")
    try:
        library.create_repo(repo, private=private, exist_ok=True)
        library.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message=message,
            delete_patterns=list(owned),
        )
    except _failures(library) as error:
        raise CheckpointError(f"{repo}: cannot be sent: {one_line(error)}") from None
    return f"https://huggingface.co/{repo}"


def model_card(config: Mapping[str, Any], parameters: int, card: Card, title: str) -> str:
    """The text of README.md.

    Args:
        config: the values of ModelConfig.
        parameters: how many numbers are trained, puzzle rows not counted.
        card: the rest.  title: the heading, and where the model is loaded from.
    """
    head = ["---", "library_name: trm_fast", "tags:", "- tiny-recursive-model"]
    if card.license:
        head.append(f"license: {card.license}")
    shown = (
        *("hidden_size", "L_layers", "H_layers", "H_cycles", "L_cycles", "num_heads", "mlp_t"),
        *("seq_len", "vocab_size", "puzzle_emb_len", "num_puzzle_identifiers", "halt_max_steps"),
        *("pos_encodings", "forward_dtype"),
    )
    rows = [f"| `{name}` | {config[name]} |" for name in shown if name in config]
    metrics = [f"| {name} | {value:.4g} |" for name, value in sorted(card.metrics.items())]
    lines = [
        *head,
        "---",
        "",
        f"# {title}",
        "",
        f"A Tiny Recursive Model of {parameters:,} parameters, saved by trm_fast {__version__}.",
        "",
        "## Architecture",
        "",
        f"Network: `{config['name']}`; every key is in `config.json`.",
        "",
        *("| setting | value |", "|---|---|"),
        *rows,
        *("", "## Data", "", card.data or "Not recorded."),
        *("", "## Training", ""),
        *(["```bash", card.command, "```"] if card.command else ["Not recorded."]),
        *("", "## Metrics", ""),
        *(["| metric | value |", "|---|---|", *metrics] if metrics else ["Not recorded."]),
        *("", "## Use", "", "```python", "from trm_fast import Model", ""),
        f'model = Model.from_pretrained("{title}")',
        "```",
    ]
    return "\n".join(lines) + "\n"
