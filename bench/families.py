"""Every family on transformers' experts interface: a pico model, the whole path, compared with transformers.

    python bench/families.py [FAMILY ...] [--write docs/families.md]

Each family runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIMIT = 600  # seconds


def run(family: str) -> dict:
    """What became of one family, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", family],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"family": family, "result": "failed", "cause": f"not done in {LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        return {
            "family": family,
            "result": "failed",
            "cause": f"the process ended with {done.returncode}: {last}",
        }
    return json.loads(lines[-1])


def one(family: str) -> dict:
    """Make the model, save it, build, compare."""
    import numpy as np
    import pico
    import torch
    import transformers
    from agreement import agreement

    from smoe.artifacts import SmoeError
    from smoe.prep.build import build
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.checkpoint.families import text_class
    from smoe.prep.checkpoint.text import Calibration
    from smoe.prep.options import Recipe
    from smoe.prep.progress import Progress

    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    about: dict = {"family": family, "config": pico.config_name(family)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle, text = (
            Path(folder) / "model",
            Path(folder) / "model.smoe",
            Path(folder) / "ids.jsonl",
        )
        ids = np.random.default_rng(0).integers(3, 211, (8, 40)).tolist()
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        stage = "make"
        try:
            config = pico.make_config(about["config"])
            if text_class(type(config)) is None:
                config.save_pretrained(checkpoint)
                open_checkpoint(checkpoint)  # is refused
            pico.make_model(about["config"]).save_pretrained(checkpoint)
            stage = "build"
            manifest = build(
                checkpoint, bundle, Calibration(str(text)), Recipe("f32"), progress=Progress(True)
            )
            about["state"] = sorted({_kind(state) for state in manifest.backbone.state})
            about["rule"] = all(layer.routing is not None for layer in manifest.layers)
            stage = "compare"
            found = agreement(bundle, checkpoint)
        except SmoeError as error:
            return about | {"result": "refused", "cause": str(error)}
        except Exception as error:  # noqa: BLE001  whatever went wrong is a row of the table
            at = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or [""])[0][:160]
            where = f"{Path(at.filename).name}:{at.lineno}"
            return about | {
                "result": "failed",
                "cause": f"{stage}: {type(error).__name__}: {first} ({where})",
            }
    cause = "" if found.good else "the logits differ too much" if found.same else "other tokens"
    return about | found.as_dict() | {"result": "same" if found.good else "differs", "cause": cause}


def _kind(state) -> str:
    if state.growing < 0:
        return "fixed"
    return "in place" if state.in_place else "growing"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| family | result | tokens of 48 | logit error | state | routing rule | why not |",
        "|" + "---|" * 7,
    ]
    for r in sorted(rows, key=lambda r: r["family"]):
        error = f"{r['error'] / r['scale']:.0e}" if "error" in r else ""
        tokens = f"{r['tokens']:.0f}" if "tokens" in r else ""
        rule = {True: "found", False: "none"}.get(r.get("rule"), "")
        cause = re.sub(r"/tmp/\S*/model", "MODEL", r["cause"]).replace("|", "/").replace("\n", " ")
        config = r.get("config", r["family"])
        name = r["family"] if config == r["family"] else f"{r['family']} ({config})"
        lines.append(
            f"| {name} | {r['result']} | {tokens} | {error} | {', '.join(r.get('state', []))} | {rule} | {cause} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print("\n" + json.dumps(one(chosen.one)))
        return
    import pico

    names = chosen.families or pico.model_files()
    rows = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for row in pool.map(run, names):
            rows.append(row)
            print(
                f"{row['family']:22} {row['result']:8} {row.get('tokens', '')!s:6} {row['cause'][:250]}",
                flush=True,
            )
    good = sum(row["result"] == "same" for row in rows)
    print(f"{good} of {len(rows)} give transformers' tokens")
    if chosen.write:
        chosen.write.write_text(HEAD.format(good=good, all=len(rows)) + table(rows) + "\n", "utf-8")


HEAD = """# Families

{good} of the {all} model files on transformers' experts interface give transformers' tokens, as pico models with random
weights, in float32. `python bench/families.py --write docs/families.md` makes this page.

*tokens*: how far greedy continuations of 48 tokens were compared, on average over four prompts: up to the first place
where the two best logits are closer than ten times the logit error. No token before differs, and 24 are wanted.
*logit error*: the largest difference, relative to the largest logit. *state*: `in place` is appended to without copying,
`growing` is replaced by a longer one, `fixed` keeps its shape. *routing rule*: whether ids and mixing weights of any other
choice can be worked out (substitution needs it).

Those that are refused: two do not generate one token after another (diffusion_gemma, openai_privacy_filter). The others have
state or attention that cannot be traced, or not without knowing the request: attention over compressed or indexed
positions whose number depends on the data (deepseek_v4, qwen4_exp), a window that spares the prompt, however long it
is (unlimited_ocr), a cache that does not know its own length (minimax), positions that are worked out from a mask and
from what the model remembers of the call before (qwen3_omni_moe). What the last column says is what a user is told.

"""

if __name__ == "__main__":
    main()
