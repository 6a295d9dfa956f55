"""SMoE's ablation, and all substitutions at equal bytes:  python bench/policies.py BUNDLE [--text FILE] [--tokens N]

Three tables for each residency (share of the experts that is in memory), from one text, teacher-forced token by token and
compared with the lossless run. The first adds the parts of SMoE one by one to plain LRU, then varies alpha. The second sets every
policy's number by bisection so that all read the same bytes per token, with the controls that the literature's
contradictions ask for; a row that cannot reach a share says how near it comes. The third gives the priced scheduler the
loss that gives SMoE's KL, and compares bytes. Loaded: experts read of those that the router wanted.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, Policies
from smoe.runtime.budget import plan_memory
from smoe.runtime.evaluate import choose, exact, graded, items, measure, read_documents, rows

EXAMPLES = Path(__file__).parents[1] / "examples"
CONTEXT, LENGTH, PROMPT = 512, 256, 32
STEPS = [
    ("lru", Policies("lru")),
    ("+ eviction by score", Policies("score")),
    ("+ substitution .35", Policies("score", substitution="smoe:0.35")),
    ("+ prefetch", Policies("score", substitution="smoe:0.35", prefetch="smoe:0.35")),
    ("our eviction alone", Policies()),
    ("our eviction, previous", Policies(prefetch="previous")),
    ("our eviction, transition", Policies(prefetch="transition")),
]
ALPHAS = (0.1, 0.25, 0.35, 0.6, 1.0, 1.5)
# name: smallest and largest number worth trying, and whether a larger one loads less
NUMBERS = {
    "priced": (1e-5, 0.5, True),
    "smoe": (0, 4, True),
    "smoe as published": (0, 4, True),
    "cache-prior": (0, 1.5, True),
    "buddy": (0.3, 1, False),
    "live": (0, 1, True),
    "zero": (0, 1, True),
    "random": (0, 1, True),
    "similar": (0, 1, True),
}


def named(name: str, number: float) -> Policies:
    """The policy of that name in `NUMBERS`."""
    if name == "priced":
        return Policies(loss=number)
    if name == "smoe as published":
        return Policies("score", substitution=f"smoe:{number}")
    return Policies(substitution=f"{name}:{number}")


class Subject:
    """One bundle and text: runs policies on it at residencies."""

    def __init__(self, bundle: Path, text: Path, tokens: int, choices: int, scratch: Path):
        self.bundle, self.manifest = bundle, open_bundle(bundle)
        documents = read_documents(text)
        with Engine.open(bundle, self.budget(0.25), CONTEXT) as engine:
            self.texts = rows(engine, documents, tokens, LENGTH)
            self.short = self.texts[: max(1, len(self.texts) // 3)]
            self.positions = sum(len(row) - min(PROMPT, len(row)) + 1 for row in self.short)
            self.questions = items(engine, documents, choices) if choices else []
            self.wanted = exact(engine, self.texts, PROMPT, scratch / "exact")
            self.answers = choose(engine, self.questions)

    def budget(self, residency: float) -> int:
        plan = plan_memory(self.manifest, None, CONTEXT)
        return plan.fixed + int(plan.experts * residency) * plan.record

    def run(self, policies: Policies, residency: float, io: str | None = None) -> dict:
        """`measure`, after one row to settle."""
        with Engine.open(
            self.bundle, self.budget(residency), CONTEXT, policies=policies, io=io
        ) as engine:
            measure(engine, self.texts[:1], PROMPT)
            found = measure(engine, self.texts, PROMPT, self.wanted)
            return found | (
                graded(choose(engine, self.questions), self.answers) if self.questions else {}
            )

    def short_run(self, policies: Policies, residency: float) -> dict:
        """The same on a third of the text, and no questions."""
        with Engine.open(self.bundle, self.budget(residency), CONTEXT, policies=policies) as engine:
            measure(engine, self.texts[:1], PROMPT)
            return measure(engine, self.short, PROMPT, self.wanted[: self.positions])

    def number_for(
        self, name: str, wanted: float, residency: float, what: str = "bytes_read"
    ) -> float:
        """The policy's number at which `what` (falling for bytes, rising for kl) of a short run is `wanted`, by bisection."""
        low, high, falls = NUMBERS[name]
        for _ in range(7):
            middle = (low * high) ** 0.5 if low else (low + high) / 2
            above = self.short_run(named(name, middle), residency)[what] > wanted
            low, high = (
                (middle, high) if above == (falls == (what == "bytes_read")) else (low, middle)
            )
        return float(f"{(low * high) ** 0.5 if low else (low + high) / 2:.3g}")


def ablation(
    subject: Subject, residency: float, alphas: list[float], rounds: int, io: str | None
) -> None:
    steps = [
        *STEPS,
        *((f"our eviction, smoe:{a}", Policies(substitution=f"smoe:{a}")) for a in alphas),
    ]
    print(f"\n{residency:.0%} of the experts in memory\n")
    print(
        "| policies | TPOT ms | of lru | stall | hits before | hits after | substituted | KL | same best | choice | answered alike |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    runs: dict[str, list[dict]] = {name: [] for name, _ in steps}
    for _ in range(rounds):  # interleaved
        for name, policies in steps:
            runs[name].append(subject.run(policies, residency, io))
    base = np.median([run["tpot"] for run in runs["lru"]])
    for name, found in runs.items():
        run, tpot = found[0], np.median([r["tpot"] for r in found])
        print(f"| {name} | {tpot * 1e3:.1f} | {tpot / base:.2f} | {run['stall_share']:.0%} | {run['hit_rate_before']:.1%} | "
              f"{run['hit_rate_after']:.1%} | {run['substituted_share']:.1%} | {run['kl']:.4f} ± {run['kl_error']:.4f} | "
              f"{run['top1']:.1%} | {_choice(run)} |", flush=True)  # fmt: skip


def equal_bytes(subject: Subject, residency: float, parts: list[float], names: list[str]) -> None:
    lossless = subject.short_run(Policies(), residency)["bytes_read"]
    print(f"\n{residency:.0%} of the experts in memory\n")
    print(
        "| bytes, of lossless | policy | bytes / token | loaded | substituted | KL | same best | choice | answered alike |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for part in parts:
        for name in names:
            number = subject.number_for(name, part * lossless, residency)
            run = subject.run(named(name, number), residency)
            print(f"| {part:.0%} | {name} {number} | {_bytes(run) / 1e3:.0f} kB | {run['loaded_share']:.1%} | "
                  f"{run['substituted_share']:.1%} | {run['kl']:.4f} ± {run['kl_error']:.4f} | {run['top1']:.1%} | "
                  f"{_choice(run)} |", flush=True)  # fmt: skip


def equal_loss(subject: Subject, residency: float, alphas: list[float]) -> None:
    print(f"\n{residency:.0%} of the experts in memory, at equal KL\n")
    print(
        "| SMoE | KL | bytes / token | --loss | KL | bytes / token | fewer bytes |\n|---|---|---|---|---|---|---|"
    )
    for alpha in alphas:
        theirs = subject.run(named("smoe", alpha), residency)
        loss = subject.number_for(
            "priced", subject.short_run(named("smoe", alpha), residency)["kl"], residency, "kl"
        )
        ours = subject.run(named("priced", loss), residency)
        print(f"| {alpha} | {theirs['kl']:.4f} | {_bytes(theirs) / 1e3:.0f} kB | {loss} | {ours['kl']:.4f} | "
              f"{_bytes(ours) / 1e3:.0f} kB | {1 - _bytes(ours) / _bytes(theirs):.0%} |", flush=True)  # fmt: skip


def _bytes(run: dict) -> float:
    return run["bytes_read"] / run["tokens"]


def _choice(run: dict) -> str:
    """Two cells: how often the true continuation was preferred, and how often the same one as in the exact run."""
    return (
        f"{run['choice_accuracy']:.1%} | {run['choice_same']:.1%}"
        if "choice_same" in run
        else "- | -"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, default=EXAMPLES / "heldout.jsonl")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--choices", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--alphas", type=float, nargs="*", default=ALPHAS)
    parser.add_argument("--residency", type=float, nargs="+", default=[0.25, 0.4, 0.6])
    parser.add_argument(
        "--policies", nargs="+", choices=NUMBERS, default=list(NUMBERS), help="Of the second table."
    )
    parser.add_argument(
        "--parts", type=float, nargs="+", default=[0.75, 0.5], help="Of the lossless bytes."
    )
    parser.add_argument(
        "--io",
        choices=["direct", "buffered"],
        help="Of the first table; direct: the page cache does not help.",
    )
    parser.add_argument("--skip", choices=["ablation", "bytes", "loss"], nargs="*", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(asked.bundle, asked.text, asked.tokens, asked.choices, Path(directory))
        if subject.questions:
            print(f"choice accuracy of the exact run: {np.mean(subject.answers == 0):.1%}")
        for residency in asked.residency:
            if "ablation" not in asked.skip:
                ablation(subject, residency, asked.alphas, asked.rounds, asked.io)
            if "bytes" not in asked.skip:
                equal_bytes(subject, residency, asked.parts, asked.policies)
            if "loss" not in asked.skip:
                equal_loss(subject, residency, [0.35, 1.0])
