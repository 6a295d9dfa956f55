"""What a loss budget buys:  python bench/prices.py BUNDLE [--residency .4] [--losses 0 .003 .01 .03] [--rounds 3]

One bundle, one text, teacher-forced token by token; rounds are interleaved, times are medians, and reads go past the page
cache, so that it is the device that is measured. KL is against the lossless run on the same text. Whether the prices themselves
are right is another question: smoe-prep verify --prices.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from policies import EXAMPLES, Subject

from smoe.runtime import Policies


def compare(
    subject: Subject, ways: dict[str, Policies], residency: float, rounds: int, io: str
) -> None:
    """One row a way: its median speed and that of the first, and what it read, spent and lost."""
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, policies in ways.items():
            runs[name].append(subject.run(policies, residency, io))
    speeds = {
        name: np.median([run["tokens_per_second"] for run in found]) for name, found in runs.items()
    }
    base = next(iter(speeds.values()))
    print(f"\n{residency:.0%} of the experts in memory, reads {io}\n")
    print(
        "| | tok/s | of the first | bytes / token | stall | guesses used / read | spent | KL | same best |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (run, *_) in runs.items():
        print(f"| {name} | {speeds[name]:.1f} | {speeds[name] / base:.2f} | {run['bytes_read'] / run['tokens'] / 1e6:.2f} MB | "
              f"{run['stall_share']:.0%} | {run['guesses_used']} / {run['guesses_read']} | {run['nats_spent']:.4f} | "
              f"{run['kl']:.4f} ± {run['kl_error']:.4f} | {run['top1']:.1%} |", flush=True)  # fmt: skip


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, default=EXAMPLES / "heldout.jsonl")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--residency", type=float, nargs="+", default=[0.4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--io", choices=["direct", "buffered"], default="direct")
    return parser


def run(asked: argparse.Namespace, ways: dict[str, Policies]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(asked.bundle, asked.text, asked.tokens, 0, Path(directory))
        for residency in asked.residency:
            compare(subject, ways, residency, asked.rounds, asked.io)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--losses", type=float, nargs="+", default=[0, 0.003, 0.01, 0.03])
    chosen = parser.parse_args()
    run(chosen, {f"--loss {loss}": Policies(loss=loss) for loss in chosen.losses})
