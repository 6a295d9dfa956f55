"""Every family in long contexts against transformers, across windows and stretched positions."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness import ChildFailed, Rows, Run, Table, bench, child, note, option

LIMIT = 1800.0  # seconds of one case
LENGTHS = (600, 2000, 5000)


@bench(
    option("--cases", nargs="+", help='model types, or such as "gpt_oss, yarn"; all if none'),
    option("--lengths", type=int, nargs="+", default=LENGTHS),
    option("--jobs", type=int, default=1, help="processes at once"),
    soak=True,
)
def lengths(run: Run) -> Rows:
    """Logits in long contexts are transformers', for every family and way to stretch positions.

    Pico models in float32 with windows of 700 tokens, stretched from 1,000: the prompt at once, in
    two parts, and tokens decoded after it. Errors are the largest of any logit, over the largest
    logit; a bundle whose context ends before a length is compared at its end.
    """
    from tests.support import lengths as support

    with ThreadPoolExecutor(run.jobs) as pool:
        jobs = [pool.submit(_in_a_process, case, run.lengths) for case in run.cases or _cases()]
        results = [job.result() for job in jobs]
    good = sum(result["result"] == "same" for result in results)
    columns = {"case": "{}", "result": "{}", "context": "{}"}
    columns |= {f"at {length}": "{:.0e}" for length in run.lengths}
    columns |= {"in two parts": "{:.0e}", "ran": "{}"}
    lines = [_line(result, run.lengths) for result in results]
    yield Table("lengths", columns, lines, f"{good} of {len(results)} within {support.CLOSE:g}")


def _cases() -> list[str]:
    from tests.support import lengths as support

    return support.cases()


def _in_a_process(case: str, lengths: list[int]) -> dict[str, Any]:
    """What became of one case; a process that fails is a row of the table."""
    try:
        result = child("lengths:one", seconds=LIMIT, case=case, lengths=lengths)
    except ChildFailed as error:
        result = {"case": case, "result": "failed", "ran": error.why}
    note(f"{case:28} {result['result']:8} {result['ran'][:200]}")
    return dict(result)


def one(case: str, lengths: list[int]) -> dict[str, Any]:
    """Make the model, build, compare. A family that is refused says why."""
    import warnings

    import torch
    import transformers

    from smoe.artifacts import SmoeError
    from tests.support import lengths as support

    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compared = support.compare(case, Path(folder), tuple(lengths))
        except SmoeError as error:
            return {"case": case, "result": "refused", "ran": str(error)[:200]}
    return compared.as_dict() | {"result": "same" if compared.good else "differs"}


def _line(result: dict[str, Any], lengths: list[int]) -> list[Any]:
    """One row of the table."""
    found = result.get("found", [])
    errors = [max(one["prompt"], one["decoded"]) for one in found]
    padded = [*errors, *[None] * (len(lengths) - len(errors))]
    parts = max((one["parts"] for one in found), default=None)
    head = [result["case"], result["result"], result.get("context")]
    return [*head, *padded, parts, result["ran"].replace("backbone: ", "")]
