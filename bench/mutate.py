"""Does a damaged bundle ever do more than say so?  python bench/mutate.py COUNT [SEED]

Random mutations of the golden bundle: a field of the manifest replaced, bits flipped, or a file cut while the manifest
agrees with its new size. Each is opened and generated from in this process. Printed: how many behaved, how many were
refused with a sentence, and every one that did neither. A crash or a hang (20 s) ends the run, and names itself.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smoe.artifacts import SmoeError
from smoe.runtime import Engine

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "v1.smoe"
VALUES = [0, -1, 1, 2, 3, 2**31, 2**62, 10**30, "", "x", None, True, 1.5, "input_ids", "logits", [], {}]


def fields(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all leaves of a manifest, but those of `files`: their sizes are what the other mutations change."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path
        return
    for key, inner in items:
        if path or key != "files":
            yield from fields(inner, (*path, key))


def mutate(bundle: Path) -> str:
    """Damage `bundle` once; says how."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    kind = random.choice(["field", "bits", "cut"])
    if kind == "field":
        *path, last = said = random.choice(list(fields(manifest)))
        inner = manifest
        for key in path:
            inner = inner[key]
        inner[last] = random.choice(VALUES)
        what = f"{said} = {inner[last]!r}"
    else:
        file = random.choice([f for f in sorted(bundle.rglob("*")) if f.is_file() and f.name != "manifest.json"])
        data = bytearray(file.read_bytes())
        if kind == "cut":
            data = data[: random.randrange(len(data))]
        else:  # headers are where the damage can be told: aim at the start of safetensors files
            reach = min(len(data), 3000) if file.suffix == ".safetensors" else len(data)
            for _ in range(random.choice([1, 4, 32])):
                data[random.randrange(reach)] ^= 1 << random.randrange(8)
        file.write_bytes(data)
        manifest["files"][str(file.relative_to(bundle))]["size"] = len(data)
        what = f"{kind}: {file.name}"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return what


def main(count: int, seed: int) -> int:
    random.seed(seed)
    behaved = refused = 0
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        for _ in range(count):
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(GOLDEN, bundle)
            what = mutate(bundle)
            signal.alarm(20)
            try:
                with Engine.open(bundle, context=64) as engine:
                    list(engine.generate([1, 2, 3], max_new_tokens=3))
                behaved += 1
            except SmoeError:
                refused += 1
            except Exception as error:  # noqa: BLE001 - anything else is what we look for
                wrong.append(f"{what}: {error!r}")
            signal.alarm(0)
    print(
        f"{count} mutations, seed {seed}: {behaved} behaved, {refused} refused with a sentence, {len(wrong)} neither"
    )
    print("\n".join(wrong))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
