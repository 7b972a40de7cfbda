"""Records what the official ARC builder and evaluator make of the tasks in tests/arc_tasks.py:
`python tests/golden/record_arc.py --official PATH` writes tests/golden/arc.json.

Owns the runs of that official code; tests/test_arc_builder.py and tests/test_arc_voting.py compare
with the file, and with `--official PATH` with the runs themselves. numba and argdantic are replaced
by stand-ins: neither changes a number.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from arc_tasks import CHOICES, VOTED, Choice, digests, predictions, write_subsets  # noqa: E402
from official import OFFICIAL_COMMIT, commit_of, official_module  # noqa: E402

FILES = ("dataset/build_arc_dataset.py", "dataset/common.py", "evaluators/arc.py")
RANKS, ATTEMPTS = 2, 8  # so many attempts that the order of ties shows


def official_build(checkout: Path, choice: Choice, prefix: str, out: Path) -> None:
    """Run the official builder."""
    module = official_module(checkout, "dataset.build_arc_dataset")
    options = dataclasses.asdict(choice) | {"subsets": list(choice.subsets)}
    config = {"input_file_prefix": prefix, "output_dir": str(out), **options}
    module.convert_dataset(module.DataProcessConfig(**config))


def official_votes(checkout: Path, root: Path, ranks: int) -> dict[str, Any]:
    """Scores and submission of the official evaluator, every `ranks`-th batch to one process."""
    module = official_module(checkout, "evaluators.arc")
    metadata = module.PuzzleDatasetMetadata(**json.loads((root / "test/dataset.json").read_text()))
    judges = [module.ARC(str(root), metadata, submission_K=ATTEMPTS) for _ in range(ranks)]
    for index, batch in enumerate(predictions(root)):
        judges[index % ranks].update_batch(batch, {})

    def gather(_own: Any, parts: list[Any], dst: int, group: Any) -> None:
        parts[:] = [(judge._local_hmap, judge._local_preds) for judge in judges]

    module.dist = type("dist", (), {"gather_object": staticmethod(gather)})
    with tempfile.TemporaryDirectory() as folder:
        scores = judges[0].result(folder, 0, ranks)
        submission = (Path(folder) / "submission.json").read_bytes()
    return {"scores": scores, "submission": hashlib.sha256(submission).hexdigest()[:16]}


def record(checkout: Path) -> dict[str, Any]:
    """Everything that arc.json holds about the official code."""
    result: dict[str, Any] = {"files": {}, "votes": {}}
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_subsets(Path(folder))
        for name, choice in CHOICES.items():
            out = Path(folder, name)
            official_build(checkout, choice, prefix, out)
            result["files"][name] = digests(out)
        for ranks in (1, RANKS):
            result["votes"][str(ranks)] = official_votes(checkout, Path(folder, VOTED), ranks)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True, metavar="PATH", help="the official checkout")
    parser.add_argument("--commit", help="its commit, where it has no .git")
    args = parser.parse_args()
    checkout = Path(args.official)
    text = {
        "official": "https://github.com/SamsungSAILMontreal/TinyRecursiveModels",
        "commit": args.commit or commit_of(checkout) or OFFICIAL_COMMIT,
        "sha256": {f: hashlib.sha256((checkout / f).read_bytes()).hexdigest() for f in FILES},
        **record(checkout),
    }
    (HERE / "arc.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
