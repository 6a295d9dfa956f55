"""Does a damaged bundle ever do more than say so?

Random mutations of the golden bundles, in child processes: fields of the manifest replaced, absurd
sizes, versions from the future, paths that lead outside, files cut, flipped or replaced by links,
headers of safetensors files rewritten, tables of programs damaged, and ONNX graphs whose weights
lie elsewhere. Each is opened and generated from, with all experts resident or with half of them
under one of the policies, and behaves or is refused with a sentence. Wrong is: another exception, a
crash, more than 20 seconds, more than 512 MiB of memory, or a read outside the bundle (of a pipe
there, which would block). The tests run some; `python -m bench soak mutations` runs 10,000.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from smoe.artifacts import SmoeError, open_bundle
from smoe.artifacts.program import PROGRAM
from smoe.runtime import Engine, Policies
from smoe.runtime.budget import memory_for
from smoe.runtime.options import tables_bytes

from . import damage

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("v*.smoe"))
VALUES = [0, -1, 1, 2, 3, "", "x", None, True, 1.5, "input_ids", "logits", [], {}, float("nan")]
ABSURD = [
    2**15,
    2**24,
    2**31,
    2**40,
    2**62,
    2**63,
    10**30,
    10**400,
    -(2**31),
    1e300,
    1e-300,
    float("inf"),
]
CANARY = "../canary.xy"  # as long as "weights.data", which it replaces in graphs
PATHS = [
    CANARY,
    "/etc/passwd",
    "../../etc/passwd",
    "backbone/../" + CANARY,
    "a\0b",
    "",
    ".",
    "manifest.json",
    "é",
    "x" * 300,
]
BATCH = 200  # mutations per process
MEMORY = 512 << 20
BEHAVED, REFUSED = "behaved", "refused"


def mutate(bundle: Path, random: Random) -> str:
    """Damage `bundle` once; says how."""
    return random.choice(MUTATIONS)(bundle, random)


# What half of the experts are resident with; None: all of them are. The newest golden bundle can do
# all.
POLICIES: list[Policies | None] = [
    None,
    Policies(prefetch="transition"),
    Policies(eviction="score", prefetch="smoe"),
    Policies(eviction="lfu", shares=True, prefetch="previous"),
    Policies(substitution="buddy", warm=False),
    Policies(substitution="similar"),
    Policies(loss=0.01, prefetch="predicted"),
    Policies(loss=0.01, prefetch="transition"),
    Policies(bits="priced:3"),
    Policies(bits="trained:3"),
]


def outcome(bundle: Path, policies: Policies | None = None) -> str:
    """Open the bundle under `policies` and generate: `BEHAVED` or `REFUSED`. Anything else is
    raised."""
    try:
        options = (
            {} if policies is None else {"beside": _half(bundle, policies), "policies": policies}
        )
        with Engine.open(bundle, context=64, **options) as engine:
            list(engine.generate([1, 2, 3], max_new_tokens=3))
    except SmoeError:
        return REFUSED
    return BEHAVED


def _half(bundle: Path, policies: Policies) -> int:
    """Bytes that half of the experts fit in."""
    opened = open_bundle(bundle)
    half = sum(layer.experts for layer in opened.manifest.layers) // 2
    return memory_for(opened, half, 64, tables=tables_bytes(policies, opened))


# -- the manifest ----------------------------------------------------------------------------------


def _leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None:
        yield path
        return
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _in_manifest(
    choose: Callable[[dict, Random], tuple[tuple, object]],
) -> Callable[[Path, Random], str]:
    def change(bundle: Path, random: Random) -> str:
        manifest = json.loads((bundle / "manifest.json").read_text())
        (*path, last), value = choose(manifest, random)
        inner = manifest
        for key in path:
            inner = inner[key]
        inner[last] = value
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        return f"{(*path, last)} = {str(value)[:60]!r}"

    return change


def _field(manifest: dict, random: Random) -> tuple[tuple, object]:
    return random.choice(list(_leaves(manifest))), random.choice(VALUES)


def _absurd(manifest: dict, random: Random) -> tuple[tuple, object]:
    def at(path: tuple) -> object:
        value: object = manifest
        for key in path:
            value = value[key]  # type: ignore[index]
        return value

    return random.choice(
        [path for path in _leaves(manifest) if type(at(path)) in (int, float)]
    ), random.choice(ABSURD)


def _version(manifest: dict, random: Random) -> tuple[tuple, object]:
    return ("version",), random.choice([3, 4, 5, 6, 7, 8, 99, 2**40, 0, -1, "2", 2.0, None, [2]])


def _path(manifest: dict, random: Random) -> tuple[tuple, object]:
    places: list[tuple] = [("backbone", "weights")]
    places += [
        ("backbone", "segments", i, "file") for i in range(len(manifest["backbone"]["segments"]))
    ]
    wanted = random.choice(PATHS)
    if random.random() < 0.5:
        manifest["files"][wanted] = manifest["files"].pop(random.choice(list(manifest["files"])))
        return ("model", "model_type"), "moved"
    return random.choice(places), wanted


# -- files -----------------------------------------------------------------------------------------


def _files(bundle: Path, ending: str = "") -> list[Path]:
    return [
        f for f in sorted(bundle.rglob("*" + ending)) if f.is_file() and f.name != "manifest.json"
    ]


def _write(bundle: Path, file: Path, data: bytes) -> None:
    """Write, and let the manifest agree with the size, as an attacker would have it."""
    file.write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][str(file.relative_to(bundle))]["size"] = len(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _cut(bundle: Path, random: Random) -> str:
    file = random.choice(_files(bundle))
    data = file.read_bytes()
    _write(
        bundle, file, data[: random.randrange(len(data))] + bytes(random.choice([0, 0, 7, 4096]))
    )
    return f"cut: {file.name}"


def _flip(bundle: Path, random: Random) -> str:
    file = random.choice(_files(bundle))
    data = bytearray(file.read_bytes())
    reach = (
        min(len(data), 3000) if file.suffix == ".safetensors" else len(data)
    )  # where damage can be told
    for _ in range(random.choice([1, 4, 32])):
        data[random.randrange(reach)] ^= 1 << random.randrange(8)
    _write(bundle, file, bytes(data))
    return f"bits: {file.name}"


def _header(bundle: Path, random: Random) -> str:
    """Rewrite a safetensors header: other offsets, shapes, dtypes, names, lengths."""
    file = random.choice(_files(bundle, ".safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = header[random.choice(names)], header[random.choice(names)]
    game = random.randrange(10)
    if game == 0:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif game == 1:
        one["data_offsets"][random.randrange(2)] += random.choice(
            [-64, -1, 1, 64, 2**40, -(2**62), 2**63]
        )
    elif game == 2:
        one["shape"] = random.choice(
            [[], [0], [2**31, 2**31], [-1], one["shape"][::-1], [*one["shape"], 1], [1] * 99, "x"]
        )
    elif game == 3:
        one["dtype"] = random.choice(["F64", "F8_E4M3", "U64", "", None, "BF16", "I8"])
    elif game == 4:
        del header[random.choice(names)]
    elif game == 5:
        header["__metadata__"] = random.choice([{"a": 1}, [], "x", {"a": "b" * 10**6}, None])
    elif game == 6:
        header[random.choice(["", "é", "x" * 10**5, "../x"])] = {
            "dtype": "U8",
            "shape": [0],
            "data_offsets": [0, 0],
        }
    raw = json.dumps(header).encode()
    if game == 7:
        raw = (
            raw[:-1] + b"," + json.dumps(names[0]).encode() + b":" + json.dumps(one).encode() + b"}"
        )  # twice
    elif game == 8:
        raw = random.choice(
            [b"[" * 10**5, b"{" * 999, b"null", b"\xff" * 64, b"", b'{"a":' * 50000]
        )
    raw += b" " * (-(8 + len(raw)) % 16384)
    claimed = (
        random.choice([0, 1, 2**63, 2**64 - 1, len(raw) + len(body), 64 << 20])
        if game == 9
        else len(raw)
    )
    _write(bundle, file, claimed.to_bytes(8, "little") + raw + body)
    return f"header game {game}: {file.name}"


def _graph(bundle: Path, random: Random) -> str:
    """Weights of a graph that lie elsewhere, or names in it exchanged."""
    file = random.choice(_files(bundle, ".onnx"))
    data = file.read_bytes()
    swaps = [
        (b"weights.data", CANARY.encode()),
        (b"MatMul", b"Gather"),
        (b"hidden", b"logits"),
        (b"Add", b"Mul"),
    ]
    old, new = random.choice(swaps)
    _write(bundle, file, data.replace(old, new))
    return f"graph: {old!r} for {new!r} in {file.name}"


def _program(bundle: Path, random: Random) -> str:
    """The table of a program damaged (damage.py), where there is one."""
    file = bundle / PROGRAM
    if not file.exists():
        return _flip(bundle, random)
    table, done = damage.damaged(file.read_text(), random)
    _write(bundle, file, (table if isinstance(table, str) else json.dumps(table)).encode())
    return f"program: {done}"


def _not_a_file(bundle: Path, random: Random) -> str:
    """A link that leads outside, a pipe, a folder, or nothing, where a file was."""
    file = random.choice([*_files(bundle), bundle / "manifest.json"])
    data = file.read_bytes()
    file.unlink()
    kind = random.choice(["link", "device", "pipe", "folder", "loop", "nothing"])
    if kind == "link":
        (bundle.parent / "elsewhere").write_bytes(
            data
        )  # a plain file, as it was, but not the bundle's
        file.symlink_to(bundle.parent / "elsewhere")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    return f"{kind}: {file.name}"


MUTATIONS: list[Callable[[Path, Random], str]] = [
    _in_manifest(_field), _in_manifest(_absurd), _in_manifest(_version), _in_manifest(_path),
    _cut, _flip, _flip, _header, _header, _graph, _program, _not_a_file,
]  # fmt: skip


# -- many of them ----------------------------------------------------------------------------------


def batch(count: int, seed: int, note: Path) -> None:
    """Run `count` mutations in this process; a line of JSON per outcome that is not good, and one
    of counts."""
    random = Random(seed)
    counts = {BEHAVED: 0, REFUSED: 0}
    with tempfile.TemporaryDirectory() as scratch:
        os.mkfifo(Path(scratch) / "canary.xy")
        bundle = Path(scratch) / "bundle"
        base = _peak()
        for _ in range(count):
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(random.choice(GOLDEN), bundle)
            policies = random.choice(POLICIES)
            what = f"{mutate(bundle, random)}, under {policies}"
            note.write_text(what)
            signal.alarm(20)
            try:
                counts[outcome(bundle, policies)] += 1
            except Exception as error:  # noqa: BLE001  anything else is what we look for
                print(json.dumps({"wrong": f"{what}: {error!r}"}))
            signal.alarm(0)
            if _peak() - base > MEMORY:
                print(json.dumps({"wrong": f"{what}: {(_peak() - base) >> 20} MiB of memory"}))
                Path("/proc/self/clear_refs").write_text("5")
    print(json.dumps(counts))


def _peak() -> int:
    return (
        int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        << 10
    )


def many(count: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """Run `count` mutations in batches, each in a process of its own: how many behaved and were
    refused, and a line for each that did neither."""
    totals, wrong = {BEHAVED: 0, REFUSED: 0}, []
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "note"
        for number, start in enumerate(range(0, count, BATCH)):
            size = min(BATCH, count - start)
            arguments = [str(size), str(seed * 10**6 + number), str(note)]
            command = [sys.executable, "-m", "support.mutate", *arguments]
            tests = Path(__file__).parents[1]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tests)
            for line in done.stdout.splitlines():
                said = json.loads(line)
                wrong += [said["wrong"]] if "wrong" in said else []
                totals = {name: totals[name] + said.get(name, 0) for name in totals}
            if done.returncode:
                wrong.append(f"process ended with {done.returncode} at: {note.read_text()}")
    return totals, wrong


if __name__ == "__main__":
    batch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
