"""What a profile and prices cost beside a plain forward pass over the same tokens:  python bench/costs.py [--rounds 3]

The plain pass is `transformers` itself in batches of as many rows. Interleaved; medians. Prices are of `--prices` tokens, from
a bundle that is packed once before.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from smoe.prep.checkpoint.checkpoint import open_checkpoint
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import PRICE_TOKENS
from smoe.prep.pack.pack import pack
from smoe.prep.prices import price
from smoe.prep.progress import Progress
from smoe.prep.statistics import profile

EXAMPLES = Path(__file__).parents[1] / "examples"


def plain(model, batches: list[np.ndarray]) -> None:
    with torch.no_grad():
        for batch in batches:
            profile.run(model, batch)


def seconds(run) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "reference")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "calibration.jsonl")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--prices", type=int, default=PRICE_TOKENS)
    parser.add_argument("--encoding", default="nested:2+1+1")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    quiet = Progress(quiet=True)
    checkpoint = open_checkpoint(asked.model)
    calibration = Calibration(asked.text, asked.tokens)
    rows = calibration.rows(checkpoint)
    drawn, _ = price.sampled(rows, asked.prices, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=torch.float32
    ).eval()
    times: dict[str, list[float]] = {"plain": [], "profile": [], "prices": []}
    with tempfile.TemporaryDirectory() as packed:
        experts = pack(checkpoint, Path(packed), asked.encoding, quiet, None)
        levels = price.Packed(experts, Path(packed))
        for _ in range(asked.rounds):
            with tempfile.TemporaryDirectory() as directory:
                times["plain"].append(seconds(lambda: plain(model, list(profile.batches(rows)))))
                times["profile"].append(
                    seconds(
                        functools.partial(
                            profile.profile, checkpoint, Path(directory), calibration, quiet, rows
                        )
                    )
                )
            times["prices"].append(
                seconds(lambda: price.price(checkpoint, drawn, 0, levels, quiet))
            )
    forward = np.median(times["plain"])
    print(f"{sum(map(len, rows))} tokens; prices of {drawn.size}")
    for name, found in times.items():
        print(
            f"{name}: {np.median(found):.1f} s ({min(found):.1f} to {max(found):.1f}), {np.median(found) / forward:.2f} x a plain pass"
        )
    each = np.median(times["prices"]) / drawn.size / (forward / sum(map(len, rows)))
    print(f"a token that is priced costs {each:.1f} x a token of the plain pass")
