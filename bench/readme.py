"""The figures of README.md:  python bench/readme.py  (about five minutes on two cores)

Builds the example model in every encoding into a temporary directory and compares each with the original token by token on
held-out text.
"""

import tempfile
from pathlib import Path

from smoe.artifacts.encodings import ENCODINGS
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import profile
from smoe.prep.verify import verify

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, CALIBRATION, HELDOUT = (
    EXAMPLES / "reference",
    EXAMPLES / "calibration.jsonl",
    EXAMPLES / "heldout.jsonl",
)
QUIET = Progress(quiet=True)


def encodings(scratch: Path) -> None:
    profiled = scratch / "profile"
    profiled.mkdir()
    profile(open_checkpoint(MODEL), profiled, Calibration(str(CALIBRATION)), QUIET)
    print("| encoding | bundle | perplexity | KL, nats per token | same best token |")
    print("|---|---|---|---|---|")
    for encoding in ENCODINGS:
        bundle = scratch / f"{encoding}.smoe"
        manifest = build(MODEL, bundle, None, Recipe(encoding), profiled, QUIET)
        found = verify(
            bundle, MODEL, Calibration(str(HELDOUT), tokens=4096, length=256), None, QUIET
        )
        if encoding == "f32":
            print(f"| original | | {found['perplexity_original']:.3f} | | |")
        size = sum(file.size for file in manifest.files.values()) / 1e6
        print(f"| {encoding} | {size:.1f} MB | {found['perplexity_bundle']:.3f} | "
              f"{found['kl_nats_per_token']:.1g} | {found['top1_agreement']:.2%} |")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        encodings(Path(directory))
