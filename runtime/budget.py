"""The budget: what the engine will hold, added up before anything is loaded, and what is left for
experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import checked_level, encoding_named
from smoe.artifacts.manifest import Layer, Manifest
from smoe.runtime.errors import EngineError

MIB = 1 << 20
_UNITS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": 1 << 30,
    "gib": 1 << 30,
    "gb": 10**9,
}

# tokens of a prompt that run at once; a constant, so that logits do not depend on the budget
CHUNK = 128
PREFILL_CHUNKS = 64  # of a prompt that share a read at most: beyond, reading hides behind computing
PREFILL_SHARE = 4  # the budget over what a prompt's chunks are to have at least, lent or kept free
LENDING = 2  # the memory of experts over what of it they lend, so that decoding finds some left
RESERVE = 10  # the part of what is spare that is left alone where no budget is stated
SLOTS = 256  # of one call of the kernels, before the last expert is added: more would be no faster

# Measured with bench/memory.py on x86-64, ONNX Runtime 1.31: the code pages that ONNX Runtime and
# tokenizers touch when they first run, what a session holds besides its weights, and what a
# tokenizer holds per byte of its file.
RUNTIME = 18 * MIB
SESSION = MIB // 2
TOKENIZER = 16


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. Experts: `capacity` may be resident, `experts` there are, `smallest` are
    needed to run at all, `token_cycle` are used by one token. `prefill` is the most that is kept of
    a prompt's chunks, beyond the first, while they share the reads of a layer's experts; `lent` of
    it are the experts', who give way for as long as the prompt takes."""

    context: int
    budget: int | None
    backbone: int
    state: int
    workspace: int
    prefill: int
    lent: int
    record: int
    capacity: int
    experts: int
    smallest: int
    token_cycle: int

    @property
    def fixed(self) -> int:
        """What neither experts nor prompts take."""
        return self.backbone + self.state + self.workspace

    @property
    def minimum(self) -> int:
        """The least that such an engine takes: few experts, and prompts in single chunks."""
        return self.fixed + self.smallest * self.record

    @property
    def total(self) -> int:
        """The most that is held at any time."""
        return self.fixed + self.capacity * self.record + self.prefill - self.lent

    def pieces(self, count: int, piece: int) -> int:
        """How many of a prompt's `count` pieces share the reads of a layer's experts, where each
        keeps `piece` bytes meanwhile: as many as make for the fewest bytes read. What experts lend
        has to be read once more for every group, and afterwards."""
        count, missing = max(1, count), (self.experts - self.capacity) * self.record

        def cost(together: int) -> tuple[int, int]:
            lent = self.lent_to(together, piece)
            return -(-count // together) * (missing + lent) + lent, -together

        most = min(count, 1 + self.prefill // piece)
        groups = -(-count // min(range(1, most + 1), key=cost))
        return -(-count // groups)

    def lent_to(self, together: int, piece: int) -> int:
        """Bytes that experts lend where so many pieces go together."""
        return max(0, (together - 1) * piece - (self.prefill - self.lent))

    def lines(self, eviction: str = "") -> list[str]:
        """For people: what the memory is used for, and a warning where the budget lies below a
        known cliff."""
        stated = (
            "no budget stated" if self.budget is None else f"of {show_size(self.budget)} stated"
        )
        out = [
            f"memory: {show_size(self.total)} {stated}: backbone {show_size(self.backbone)}, state "
            f"{show_size(self.state)}, "
            f"workspace {show_size(self.workspace)}, {self.capacity} of {self.experts} experts "
            f"{show_size(self.capacity * self.record)}; prompts take up to "
            f"{show_size(self.prefill)} more, of which experts lend {show_size(self.lent)}"
        ]
        if self.capacity < min(self.token_cycle, self.experts):
            enough = show_size(
                self.total + (self.token_cycle - self.capacity) * self.record, up=True
            )
            what = (
                "eviction lru then never hits; use another"
                if eviction == "lru"
                else "few of them are here when they are wanted again"
            )
            out.append(
                f"warning: {self.capacity} resident experts are fewer than one token uses "
                f"({self.token_cycle}): {what}, "
                f"or allow {enough}"
            )
        return out


def plan_memory(
    bundle: Bundle,
    budget: int | None,
    context: int | None = None,
    level: int | None = None,
    tables: int = 0,
) -> MemoryPlan:
    """Divide `budget` bytes (None: as much as it takes) for sequences of `context` tokens (None:
    2048, or what the model was made for if that is less), experts at `level` (None: the highest)
    and so many bytes of `tables`. An `EngineError` names the minimum where the budget is too
    small."""
    manifest = bundle.manifest
    layers, longest = manifest.layers, manifest.model.context
    context = min(2048, longest) if context is None else context
    if not 1 <= context <= longest:
        raise EngineError(
            f"A context of {context} tokens was asked for; this model takes 1 to {longest}."
        )
    level = checked_level(encoding_named(manifest.experts.encoding), level)
    record = max(layout.levels[level - 1] for layout in bundle.layouts)
    tokenizer = manifest.files["tokenizer.json"].size if "tokenizer.json" in manifest.files else 0
    copies = 1 if manifest.backbone.precision == "f32" else 2  # ONNX Runtime's own, if not float
    backbone = copies * manifest.files[manifest.backbone.weights].size
    backbone += SESSION * len(manifest.backbone.segments) + RUNTIME + TOKENIZER * tokenizer
    state = sum(spec.nbytes(context) for spec in manifest.backbone.state)
    workspace = _workspace(manifest, context) + tables
    experts, smallest = sum(layer.experts for layer in layers), max(layer.top_k for layer in layers)
    fixed = backbone + state + workspace
    if budget is not None and budget < fixed + smallest * record:
        raise EngineError(
            f"A budget of {show_size(budget)} is too small: this bundle needs at least "
            f"{show_size(fixed + smallest * record, up=True)} "
            f"with a context of {context} (backbone {show_size(backbone)}, state "
            f"{show_size(state)}, workspace {show_size(workspace)}, "
            f"{smallest} experts {show_size(smallest * record)}). State more memory or a shorter "
            f"context."
        )
    cycle = sum(layer.top_k for layer in layers)
    capacity, prefill, lent = experts, _prefill(manifest, context), 0
    if budget is not None:
        room = budget - fixed
        least = min(prefill, budget // PREFILL_SHARE, max(0, room - cycle * record))
        capacity = _resident(room, least, record, smallest, experts)
        prefill, lent = _lent(room, prefill, record, smallest, capacity, experts)
    return MemoryPlan(
        context=context,
        budget=budget,
        backbone=backbone,
        state=state,
        workspace=workspace,
        prefill=prefill,
        lent=lent,
        record=record,
        capacity=capacity,
        experts=experts,
        smallest=smallest,
        token_cycle=cycle,
    )


def memory_for(
    bundle: Bundle,
    experts: int,
    context: int | None = None,
    level: int | None = None,
    tables: int = 0,
) -> int:
    """The least budget, in bytes, in which so many `experts` stay; the rest as in `plan_memory`.
    More memory never holds fewer."""
    whole = plan_memory(bundle, None, context, level, tables)
    low, high = whole.minimum, whole.total
    while low < high:
        middle = (low + high) // 2
        enough = plan_memory(bundle, middle, context, level, tables).capacity >= experts
        low, high = (low, middle) if enough else (middle + 1, high)
    return high


def _resident(room: int, prefill: int, record: int, smallest: int, experts: int) -> int:
    """How many of the `experts` of `record` bytes are resident in `room`, where a prompt is to have
    `prefill` bytes at least: what they cannot lend of it is kept free."""
    for capacity in range(min(room // record, experts), smallest, -1):
        lent = min(prefill, _lendable(capacity, record, smallest))
        if capacity * record + prefill - lent <= room:
            return capacity
    return smallest


def _lent(
    room: int, prefill: int, record: int, smallest: int, capacity: int, experts: int
) -> tuple[int, int]:
    """What a prompt that would like `prefill` bytes gets, and how much of it experts lend: nothing
    where all of them are resident."""
    spare = room - capacity * record
    lendable = _lendable(capacity, record, smallest) if capacity < experts else 0
    prefill = min(prefill, spare + lendable)
    return prefill, max(0, prefill - spare)


def _lendable(capacity: int, record: int, smallest: int) -> int:
    """Bytes that so many experts can do without for a while."""
    return min(capacity * record // LENDING, (capacity - smallest) * record)


def _prefill(manifest: Manifest, context: int) -> int:
    """What a prompt of `context` tokens keeps beyond its first chunk: residual, a mask, and what
    the experts of one layer receive and give, by slot."""
    tokens = max(0, min(context, PREFILL_CHUNKS * CHUNK) - chunk_tokens(manifest))
    return tokens * (
        4 * context + max(slot_bytes(layer) + 16 * layer.hidden for layer in manifest.layers)
    )


def slot_bytes(layer: Layer) -> int:
    """What a token takes while a layer's experts run: what they receive, what every slot gives, and
    the sum."""
    return 4 * layer.hidden * (layer.top_k + 2)


def default_budget(whole: int, spare: int | None) -> int | None:
    """What to allow where nothing is stated: None, all experts, if `whole` bytes leave a reserve of
    the `spare` ones that the machine and its cgroup have; otherwise what is spare less that
    reserve."""
    if spare is None or whole <= spare - spare // RESERVE:
        return None
    return spare - spare // RESERVE


def _workspace(manifest: Manifest, context: int) -> int:
    """Intermediate values of one chunk: a few copies of the hidden state and of every slot's
    output, the attention scores of all heads and the mask, the logits of one token (of a chunk,
    where the graph gives all), and what the kernels hold of the slots in one call."""
    widest = max(layer.hidden * (96 + 8 * layer.top_k) for layer in manifest.layers)
    fused = all(state.in_place for state in manifest.backbone.state)
    per_position = 4 * manifest.backbone.heads * (1 if fused else 3) + 16
    sliced = "logits_to_keep" in manifest.backbone.segments[-1].inputs
    tokens = chunk_tokens(manifest)
    logits = 4 * manifest.model.vocabulary * (2 if sliced else tokens + 1)
    slots = min(SLOTS + tokens, tokens * max(layer.top_k for layer in manifest.layers))
    kernels = slots * max(8 * layer.hidden + 10 * layer.width for layer in manifest.layers)
    return tokens * (widest + per_position * context) + logits + kernels


def chunk_tokens(manifest: Manifest) -> int:
    """How many tokens of a prompt run at once."""
    return 1 if manifest.backbone.one_at_a_time else CHUNK


def parse_size(text: str | int) -> int:
    """Bytes of "64MiB", "1.5G", "500 MB" or an integer; an `EngineError` for anything else."""
    if isinstance(text, (int, np.integer)) and not isinstance(text, bool):
        return int(text)
    if not isinstance(text, str):
        raise EngineError(f"{text!r} is not a size; give an integer of bytes, or text like 64MiB.")
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise EngineError(f"{text!r} is not a size; write it like 64MiB, 1.5GiB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def show_size(size: int, up: bool = False) -> str:
    """Bytes for people. With `up` rounded up, so that the figure can be given back as a budget."""
    mib = size / MIB
    return f"{-(-size * 10 // MIB) / 10:.1f}MiB" if up else f"{mib:.1f}MiB"
