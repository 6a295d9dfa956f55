"""What each level of the nested encodings costs:  python bench/nested.py [--calibration FILE] [--text FILE] [--tokens N]

Builds the example model, with codes found by calibration and by plain rounding (the same bytes), and compares every
level with the original token by token through the runtime's decode path: by how much perplexity rises, with the 95 %
interval of the paired difference, and KL. Bits count codes and scales.
"""

import argparse
import tempfile
from pathlib import Path

from smoe.artifacts import nested
from smoe.prep.build import build
from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.prep.progress import Progress
from smoe.prep.statistics.profile import profile
from smoe.prep.verify import verify

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "reference"
ENCODINGS = ("nested:2+1+1:128", "nested:5+1+1+1:128")
QUIET = Progress(quiet=True)


def main(
    calibration: str, calibration_tokens: int, text: str, tokens: int, encodings: list[str]
) -> None:
    source = Calibration(calibration, calibration_tokens)
    print(
        "| encoding | level | bits per weight | perplexity, calibrated | KL | perplexity, rounded | KL |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        profiled = Path(scratch) / "profile"  # the rounded codes do not depend on it: a short one
        profiled.mkdir()
        profile(
            open_checkpoint(MODEL),
            profiled,
            Calibration(str(EXAMPLES / "calibration.jsonl"), 2048),
            QUIET,
        )
        for name in encodings:
            encoding = nested.parse(name)
            made = {}
            for quantiser in ("calibrated", "nearest"):
                made[quantiser] = (
                    Path(scratch) / f"{quantiser}-{len(made)}-{encodings.index(name)}.smoe"
                )
                text_or_profile = (source, None) if quantiser == "calibrated" else (None, profiled)
                build(MODEL, made[quantiser], text_or_profile[0], Recipe(name, quantiser=quantiser),
                      text_or_profile[1], QUIET)  # fmt: skip
            for level in range(1, encoding.levels + 1):
                found = [
                    verify(
                        made[q], MODEL, Calibration(text, tokens, length=256), None, QUIET, level
                    )
                    for q in made
                ]
                shown = " | ".join(
                    f"{f['perplexity_rise_percent']:+.2f} % ± {f['perplexity_rise_interval']:.2f} | "
                    f"{f['kl_nats_per_token']:.4f}" for f in found
                )  # fmt: skip
                bits = encoding.split.bits(level) + 16 / encoding.group
                print(f"| {name} | {level} | {bits:.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", default=str(EXAMPLES / "calibration.jsonl"))
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--text", default=str(EXAMPLES / "heldout.jsonl"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS))
    main(**vars(parser.parse_args()))
