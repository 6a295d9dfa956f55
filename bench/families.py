"""Every family on transformers' experts interface: a pico model, the whole path, compared with
transformers."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness import (
    Rows,
    Run,
    Table,
    bench,
    child_command,
    child_environment,
    child_result,
    note,
    option,
)  # fmt: skip

LIMIT = 600  # seconds of one family
TOKENS = 211  # of a pico vocabulary
COLUMNS = {
    "family": "{}", "result": "{}", "tokens of 48": "{:.0f}", "logit error": "{:.0e}",
    "state": "{}", "routing rule": "{}", "program": "{}", "why not": "{}",
}  # fmt: skip


@bench(
    option("--families", nargs="+", help="model types; all if none is given"),
    option("--jobs", type=int, default=2, help="processes at once"),
)
def families(run: Run) -> Rows:
    """Does every model file on the experts interface give transformers' tokens?"""
    from tests.support import pico

    with ThreadPoolExecutor(run.jobs) as pool:
        results = list(pool.map(_in_a_process, run.families or pico.model_files()))
    good = sum(result["result"] == "same" for result in results)
    lines = [_line(result) for result in sorted(results, key=lambda result: result["family"])]
    yield Table("families", COLUMNS, lines, f"{good} of {len(results)} give transformers' tokens")


def _in_a_process(family: str) -> dict[str, Any]:
    """What became of one family; a process that fails is a row of the table."""
    command = child_command("families:one", {"family": family})
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=child_environment()
        )
    except subprocess.TimeoutExpired:
        return {"family": family, "result": "failed", "cause": f"not done in {LIMIT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        places = [line for line in lines if line.startswith("  File ")]
        where = re.sub(r'.*/([^/"]+)", line (\d+).*', r" (\1:\2)", places[-1]) if places else ""
        result = {"family": family, "result": "failed", "cause": lines[-1][:160] + where}
    else:
        result = child_result(done.stdout)
    note(f"{family:22} {result['result']:8} {result['cause'][:250]}")
    return result


def one(family: str) -> dict[str, Any]:
    """Make the model, save it, build, compare."""
    import warnings

    import numpy as np
    import torch
    import transformers

    from smoe.artifacts import SmoeError
    from tests.support import pico
    from tests.support.agreement import agreement

    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"family": family, "config": pico.config_name(family)}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "ids.jsonl"
        ids = np.random.default_rng(0).integers(3, TOKENS, (8, 40)).tolist()
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        try:
            result |= _built(result["config"], Path(folder), text)
            agreed = agreement(Path(folder) / "model.smoe", Path(folder) / "model")
        except SmoeError as error:
            return result | {"result": "refused", "cause": str(error)}
    cause = "" if agreed.good else "the logits differ too much" if agreed.same else "other tokens"
    outcome = {"result": "same" if agreed.good else "differs", "cause": cause}
    return result | agreed.as_dict() | outcome


def _built(config_name: str, folder: Path, text: Path) -> dict[str, Any]:
    """Build model.smoe of a pico model; the kinds of its state, and whether a routing rule was
    found."""
    from smoe.prep.build import build
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.checkpoint.families import text_class
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe
    from smoe.prep.progress import Progress
    from tests.support import pico

    checkpoint, bundle = folder / "model", folder / "model.smoe"
    config = pico.make_config(config_name)
    if text_class(type(config)) is None:
        config.save_pretrained(checkpoint)
        open_checkpoint(checkpoint)  # is refused
    pico.make_model(config_name).save_pretrained(checkpoint)
    quiet = Progress(quiet=True)
    built = build(checkpoint, bundle, Calibration(str(text)), Recipe("f32"), progress=quiet)
    manifest = built.manifest
    return {
        "state": sorted({_kind(state) for state in manifest.backbone.state}),
        "rule": all(layer.routing is not None for layer in manifest.layers),
        "program": _program(bundle),
    }


def _program(bundle: Path) -> str:
    """How much of the backbone compiles, and the first reason why not all of it does."""
    from smoe.artifacts import open_bundle

    opened = open_bundle(bundle)
    if opened.program is None:
        return "none"
    reasons = [part.reason for part in opened.program.parts if part.ops is None]
    every = len(opened.program.parts)
    causes = [reason for reason in reasons if ", which others take, " not in reason] or reasons
    return f"{every - len(reasons)} of {every}: {causes[0][:120]}" if reasons else "whole"


def _kind(state: Any) -> str:
    if state.growing < 0:
        return "fixed"
    return "in place" if state.in_place else "growing"


def _line(result: dict[str, Any]) -> list[Any]:
    """One row of the table."""
    family, config = result["family"], result.get("config", result["family"])
    rule = {True: "found", False: "none"}.get(result.get("rule"))
    return [
        family if config == family else f"{family} ({config})",
        result["result"],
        result.get("tokens"),
        result["error"] / result["scale"] if "error" in result else None,
        ", ".join(result.get("state", [])),
        rule,
        result.get("program"),
        re.sub(r"/tmp/\S*/model", "MODEL", result["cause"]),
    ]
