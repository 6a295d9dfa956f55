"""One task three ways: lm-evaluation-harness on transformers' model, on a bundle of it in its own
process, and on the same bundle behind `smoe serve`.

The task is made here: how held-out texts go on, beside how three others do, by likelihood."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import models, options
from bench.harness import Rows, Run, Table, bench, note, option

SHOWN, RIGHT = 240, 80  # characters of a text, and of how it goes on
CHOICES = 4
TASK = """\
task: goes_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@bench(
    options.TEXT, option("--model", type=Path, default=models.EXAMPLE, help="in safetensors"),
    option("--bundle", type=Path, required=True, help="of that model, in f32"),
    option("--items", type=int, default=50),
)  # fmt: skip
def evals(run: Run) -> Rows:
    """Answers of lm-eval by transformers, in process, and through the server: the same."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.mkdir()
        (task / "items.jsonl").write_text("\n".join(map(json.dumps, _items(run))))
        (task / "goes_on.yaml").write_text(TASK.format(items=task / "items.jsonl"))
        with _server(run.bundle, Path(folder) / "log") as port:
            address = f"http://127.0.0.1:{port}/v1/completions"
            ways = {
                "transformers": ("hf", f"pretrained={run.model},dtype=float32"),
                "in process": ("smoe", f"bundle={run.bundle}"),
                "through the server": (
                    "local-completions",
                    f"model=m,base_url={address},tokenizer_backend=remote,num_concurrent=2",
                ),
            }
            said = {way: _answers(task, Path(folder), *how) for way, how in ways.items()}
    first = next(iter(said.values()))
    lines: list[list[Any]] = []
    for way, answers in said.items():
        count = len(answers)
        right = sum(answer["right"] for answer in answers) / count
        chance = 1 / CHOICES
        above = (right - chance) / math.sqrt(chance * (1 - chance) / count)
        pairs = list(zip(answers, first, strict=True))
        same = sum(one["chosen"] == other["chosen"] for one, other in pairs)
        apart = max(
            abs(a - b)
            for one, other in pairs
            for a, b in zip(one["nats"], other["nats"], strict=True)
        )
        lines.append([way, count, right, above, same, apart])
    columns = {
        "way": "{}", "items": "{}", "right": "{:.2f}", "sigma above chance": "{:.1f}",
        "same answers": "{}", "log-likelihoods apart, at most": "{:.1e}",
    }  # fmt: skip
    yield Table("evals", columns, lines, f"{CHOICES} choices, beside transformers")


def _items(run: Run) -> Iterator[dict[str, Any]]:
    """Texts with how they go on among others', each in another place."""
    lines = [json.loads(line)["text"] for line in run.text.read_text().splitlines()]
    whole = SHOWN + RIGHT
    pieces = [text[at : at + whole] for text in lines for at in range(0, len(text) - whole, whole)]
    step = max(1, len(pieces) // run.items)
    pieces = pieces[::step][: run.items]
    if len(pieces) < max(run.items, CHOICES):
        raise SystemExit(f"{run.text} has text for {len(pieces)} items; ask for fewer.")
    for number, piece in enumerate(pieces):
        others = [pieces[(number + 1 + n) % len(pieces)][SHOWN:] for n in range(CHOICES - 1)]
        label = number % CHOICES
        choices = [*others[:label], piece[SHOWN:], *others[label:]]
        yield {"context": piece[:SHOWN], "choices": choices, "label": label}


def _answers(task: Path, folder: Path, model: str, arguments: str) -> list[dict[str, Any]]:
    """What the harness' own command says of every item, in their order."""
    note(f"lm-eval: {model}")
    out = folder / model
    command = [
        sys.executable, "-m", "smoe.prep.integrations.lm_eval", "--model", model, "--model_args",
        arguments, "--tasks", "goes_on", "--include_path", str(task), "--batch_size", "1",
        "--log_samples", "--output_path", str(out), "--device", "cpu",
    ]  # fmt: skip
    settings = {"HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "-"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        note(done.stderr[:3000] + done.stderr[-3000:])
        raise SystemExit(f"lm-eval with {model} ended with {done.returncode}.")
    (samples,) = out.rglob("samples_*.jsonl")
    answers = []
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        nats = [float(one[0][0] if isinstance(one[0], list) else one[0]) for one in sample["resps"]]
        chosen = max(range(len(nats)), key=nats.__getitem__)
        answers.append(
            {"id": sample["doc_id"], "nats": nats, "chosen": chosen, "right": sample["acc"]}
        )
    return sorted(answers, key=lambda answer: answer["id"])


@contextmanager
def _server(bundle: Path, log: Path) -> Iterator[int]:
    """`smoe serve` in a process of its own."""
    how = ["--port", "0", "--model-name", "m"]
    command = [sys.executable, "-m", "smoe.runtime", "serve", str(bundle), *how]
    with open(log, "w") as told:
        server = subprocess.Popen(command, stderr=told, stdout=told)
    try:
        while "serving:" not in (text := log.read_text()):
            if server.poll() is not None:
                raise SystemExit(f"The server ended: {text[-2000:]}")
            time.sleep(0.05)
        line = next(line for line in text.splitlines() if line.startswith("serving:"))
        yield int(line.partition("http://")[2].split()[0].rpartition(":")[2].strip("/"))
    finally:
        server.terminate()
        server.wait()
