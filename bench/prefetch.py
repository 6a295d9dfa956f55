"""Guesses against none, in wall time:  python bench/prefetch.py BUNDLE [--residency .25 .4] [--rounds 3]

First what the predictors know (recall on text that they were not learned from, as the bundle has it; as many guesses as
experts, so that precision is the same), then what reading by them brings, interleaved with not reading ahead.
"""

import numpy as np
from prices import arguments, run

from smoe.artifacts import open_bundle
from smoe.artifacts.tables import DISTANCES, PREDICTORS, load_tables
from smoe.runtime import Policies

WAYS = ["none", "previous", "transition", "predicted:1", "predicted:2", "predicted:3", "smoe:0.35"]

if __name__ == "__main__":
    chosen = arguments(__doc__).parse_args()
    experts = [layer.experts for layer in open_bundle(chosen.bundle).manifest.layers]
    tables = load_tables(chosen.bundle / "tables.safetensors", experts, ("predict_recall",))
    recall = np.nanmean([of["predict_recall"] for of in tables if of], 0)
    print(
        "| recall | "
        + " | ".join(f"{d} ahead" for d in DISTANCES)
        + " |\n|---"
        + "|---" * len(DISTANCES)
        + "|"
    )
    for name, row in zip(PREDICTORS, recall, strict=True):
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    run(chosen, {f"--prefetch {way}": Policies(prefetch=way) for way in WAYS})
