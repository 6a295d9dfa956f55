"""Does a damaged session ever do more than say so?

A saved session with bytes flipped, cut off, added or moved, with another header, with metadata and
arrays that are others, and, as somebody could write it on purpose, with a digest that is right and
ids, state and shapes that are not. Each is refused with a sentence and left alone, or goes on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from smoe.artifacts.safetensors_file import DTYPES
from smoe.runtime import Engine, EngineError
from smoe.runtime.conversation import Conversation
from smoe.runtime.session import load, save

ABSURD = [-1, 0, 1, 7, 31, 33, 2**15, 2**31, 2**40, 2**62, 2**63, 10**30, 1.5, "x", None, [], {}]
TEXTS = ["", "x", "\ud800", "[" * 10_000, "{}", '{"system":1,"turns":[]}', "null", "9" * 5000]
TEXTS += ['{"system":null,"turns":[["a"]]}', '{"system":null,"turns":[["a",2]]}', "smoe session 2"]
WENT_ON, REFUSED = "went on", "refused"

Table = dict[str, Any]


def outcome(engine: Engine, file: Path) -> str:
    """What a damaged file does to an engine that had something else in its sequence."""
    written, before = file.read_bytes(), engine.sequence
    try:
        load(engine, file)
    except EngineError as error:
        said = str(error)
        assert str(file) in said and "left as it is" in said and len(said) < 2000, said
        assert engine.sequence is before
        done = REFUSED
    else:
        ids = [*engine.sequence.ids[:-1], 3]
        assert len(list(engine.generate(ids, max_new_tokens=2, reuse=True))) > 0
        done = WENT_ON
    assert file.read_bytes() == written
    return done


def many(bundle: Path, count: int, seed: int, state: str | None = None) -> tuple[dict, list[str]]:
    """Of so many damaged sessions of `bundle`, how many went on and how many were refused; and what
    those did that ended in another way."""
    counts, wrong, random = {WENT_ON: 0, REFUSED: 0}, [], Random(seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.open(bundle, beside="1GiB", context=96, state=state) as engine,
    ):
        file, whole = Path(folder) / "damaged.session", Path(folder) / "whole.session"
        vocabulary = engine.manifest.model.vocabulary
        prompt = np.random.default_rng(seed).integers(1, vocabulary, 40)
        list(engine.generate(prompt, max_new_tokens=3))
        save(engine, whole, Conversation("be brief", [("hello", "hi"), ("who", "me")]))
        written = whole.read_bytes()
        assert outcome(engine, whole) == WENT_ON
        for _ in range(count):
            data, done = damaged(written, random)
            file.write_bytes(data)
            try:
                counts[outcome(engine, file)] += 1
            except Exception as error:  # noqa: BLE001  anything else is what we look for
                wrong.append(f"{done}: {error!r}")
    return counts, wrong


def damaged(written: bytes, random: Random) -> tuple[bytes, str]:
    """A session with one damage, and which."""
    damage = random.choice([_flipped, _cut, _moved, _header, _header, _signed, _signed])
    return damage(written, random), damage.__name__


def _flipped(written: bytes, random: Random) -> bytes:
    data = bytearray(written)
    for _ in range(random.choice([1, 1, 4, 100])):
        place = random.randrange(random.choice([16, len(data)]))
        data[place] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(written: bytes, random: Random) -> bytes:
    end = random.choice([0, 1, 7, 8, 9, random.randrange(len(written)), len(written) - 1])
    return written[:end] if random.random() < 0.8 else written + bytes(end)


def _moved(written: bytes, random: Random) -> bytes:
    one, other = sorted(random.randrange(len(written)) for _ in range(2))
    return written[other:] + written[one:other] + written[:one]


def _header(written: bytes, random: Random) -> bytes:
    header, data = _parted(written)
    _change(header, random)
    return _joined(header, data)


def _signed(written: bytes, random: Random) -> bytes:
    """Whatever it is, its digest is right."""
    header, data = _parted(written)
    tensors = [name for name in header if name != "__metadata__"]
    game = random.randrange(4)
    if game == 0:
        _change(header, random)
    elif game == 1:  # ids or state of anything
        name = random.choice([random.choice(tensors), "ids"])
        start, end = header[name]["data_offsets"]
        data = data[:start] + random.randbytes(end - start) + data[end:]
    elif game == 2:  # another number of tokens
        count = random.choice([0, 1, 39, 41, 96, 97, 4000])
        data = np.arange(count, dtype=np.int64).tobytes() + data[header["ids"]["data_offsets"][1] :]
        header["ids"]["shape"] = [count]
        _laid_out(header)
    else:  # arrays that change names
        one, other = random.choice(tensors), random.choice(tensors)
        header[one], header[other] = header[other], header[one]
    end = header.get("sha256")
    if isinstance(end, dict) and isinstance(end.get("data_offsets"), list):
        raw = json.dumps(header, separators=(",", ":")).encode()
        data = data[:-32] + hashlib.sha256(raw + data[:-32]).digest()
    return _joined(header, data)


def _change(header: Table, random: Random) -> None:
    """A field of the header is another."""
    game = random.randrange(5)
    names = [name for name in header if name != "__metadata__"]
    name, about = random.choice(names), header["__metadata__"]
    if game == 0:
        about[random.choice([*about])] = random.choice([*TEXTS, *about.values(), 5, None])
    elif game == 1:
        header[name][random.choice(["shape", "data_offsets", "dtype"])] = random.choice(ABSURD)
    elif game == 2:
        numbers = header[name][random.choice(["shape", "data_offsets"])]
        numbers[random.randrange(len(numbers))] = random.choice(ABSURD)
    elif game == 3:
        del header[random.choice([name, "__metadata__"])]
    else:
        header[random.choice(["extra", "../x", "\x1b[2J", "0"])] = header.pop(name)


def _laid_out(header: Table) -> None:
    """Offsets of arrays that follow one another."""
    offset = 0
    for name, fields in header.items():
        if name != "__metadata__":
            nbytes = int(np.prod(fields["shape"])) * DTYPES[fields["dtype"]].itemsize
            fields["data_offsets"] = [offset, offset + nbytes]
            offset += nbytes


def _parted(written: bytes) -> tuple[Table, bytes]:
    length = int.from_bytes(written[:8], "little")
    return json.loads(written[8 : 8 + length]), written[8 + length :]


def _joined(header: Table, data: bytes) -> bytes:
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data
