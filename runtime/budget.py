"""The budget: what the process will hold, added up before anything is loaded, and what is left for
experts. What it may be here, and what the process holds already, `allowance` finds out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from smoe.artifacts.bundle import Bundle
from smoe.artifacts.encodings import checked_level, encoding_named
from smoe.artifacts.manifest import Layer, Manifest
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import AUTO, Division, Execution, divide
from smoe.runtime.sizes import MIB, show_size

# tokens of a prompt that run at once; a constant, so that logits do not depend on the budget
CHUNK = 128
PREFILL_CHUNKS = 64  # of a prompt that share a read at most: beyond, reading hides behind computing
PREFILL_SHARE = 4  # the budget over what a prompt's chunks are to have at least, lent or kept free
LENDING = 2  # the memory of experts over what of it they lend, so that decoding finds some left
RESERVE = 10  # the part of what may be held that is left alone where no budget is stated
SLOTS = 256  # of one call of the kernels, before the last expert is added: more would be no faster

# Measured with bench/memory.py on x86-64: what a tokenizer holds per byte of its file, and what it
# takes per token while it reads a prompt.
TOKENIZER = 16
READING = 512
IDS = 64  # bytes of a token in the lists that a request keeps of its ids
MOST_REQUESTS = 1024
# What `smoe run` holds before it opens a bundle, for plans that are made elsewhere, what ONNX
# Runtime's libraries add to it; and the part of it by which two such processes may differ, which a
# minimum that is said has in it.
PROCESS = 40 * MIB
ONNX_PROCESS = 24 * MIB
SWING = 16


@dataclass(frozen=True)
class Source:
    """Where a budget comes from, for people: `of` follows what a plan takes of it, `called` is the
    budget, `way_out` says what to do where it is too small. Figures are of the whole process, or
    where a budget is `beside` what the process holds, beside that."""

    of: str
    called: str
    way_out: str = "State more memory or a shorter context."
    beside: bool = False


@dataclass(frozen=True)
class Requests:
    """`count` sequences that advance at once, and how many tokens they hold together (None: a whole
    context each)."""

    count: int = 1
    held: int | None = None

    def tokens(self, context: int) -> int:
        """Those, each sequence of up to `context`; an `EngineError` for what cannot be."""
        if not 1 <= self.count <= MOST_REQUESTS:
            raise EngineError(
                f"{self.count} requests at once were asked for; there may be 1 to {MOST_REQUESTS}."
            )
        tokens = self.count * context if self.held is None else self.held
        if not context <= tokens <= self.count * context:
            raise EngineError(
                f"{self.count} requests are to hold {tokens} tokens together; with a context of "
                f"{context} each they hold {context} to {self.count * context}."
            )
        return tokens


ONE = Requests()


@dataclass(frozen=True)
class MemoryPlan:
    """`requests` sequences of up to `context` tokens, of which they hold `held` together. Bytes by
    purpose. Experts: `capacity` may be resident, `experts` there are, `smallest` are
    needed to run at all, `token_cycle` are used by one token. `prefill` is the most that is kept of
    a prompt's chunks, beyond the first, while they share the reads of a layer's experts; `lent` of
    it are the experts', who give way for as long as the prompt takes. `process` is what is there
    without an engine, 0 where the engine alone is planned, with ONNX Runtime loaded where
    `onnxruntime`; `source` says where the budget comes from."""

    context: int
    requests: int
    held: int
    budget: int | None
    onnxruntime: bool
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
    process: int
    source: Source

    @property
    def fixed(self) -> int:
        """What neither experts nor prompts take."""
        return self.process + self.backbone + self.state + self.workspace

    @property
    def minimum(self) -> int:
        """The least that will do, in any process like this one: few experts, and prompts in single
        chunks."""
        return self.fixed + self.smallest * self.record + self.process // SWING

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
        out = [
            f"memory: {show_size(self.total)} {self.source.of}: {self._fixed_parts()}, "
            f"{self.capacity} of {self.experts} experts "
            f"{show_size(self.capacity * self.record)}; prompts take up to "
            f"{show_size(self.prefill)} more, of which experts lend {show_size(self.lent)}"
        ]
        if self.capacity < min(self.token_cycle, self.experts):
            missing = (self.token_cycle - self.capacity) * self.record
            enough = show_size(self.as_stated(self.total + missing), up=True)
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

    def requests_line(self, onnx: bool) -> list[str]:
        """For people: how many requests share it, where there may be several."""
        if self.requests == 1:
            return []
        apart = "; segments in ONNX Runtime run for each of them" if onnx else ""
        return [
            f"requests: up to {self.requests} at once, of {self.held} tokens together, up to "
            f"{self.context} each{apart}"
        ]

    def too_small(self) -> EngineError:
        """What is said where the budget holds no such plan."""
        swing = self.process // SWING if self.source.beside else 0
        least = show_size(self.as_stated(self.minimum - swing), up=True)
        return EngineError(
            f"{self.source.called} is too small: this bundle needs at least {least} with a context "
            f"of {self.context}{self._together()} ({self._fixed_parts()}, {self.smallest} experts "
            f"{show_size(self.smallest * self.record)}). {self.source.way_out}"
        )

    def _together(self) -> str:
        more = self.requests > 1
        return (
            f" and {self.requests} requests that hold {self.held} tokens together" if more else ""
        )

    def _fixed_parts(self) -> str:
        parts = {
            "process": self.process,
            "backbone": self.backbone,
            "state": self.state,
            "workspace": self.workspace,
        }
        return ", ".join(f"{name} {show_size(parts[name])}" for name in parts if parts[name])

    def as_stated(self, nbytes: int) -> int:
        """So many bytes in all, as the user counts them."""
        return nbytes - self.process if self.source.beside else nbytes


def plan_memory(
    bundle: Bundle,
    budget: int | None,
    context: int | None = None,
    level: int | None = None,
    tables: int = 0,
    process: int = 0,
    source: Source | None = None,
    execution: Execution = AUTO,
    requests: Requests = ONE,
) -> MemoryPlan:
    """Divide `budget` bytes (None: as much as it takes) for so many `requests`, sequences of
    `context` tokens (None: 2048, or what the model was made for if that is less), experts at
    `level` (None: the highest), so many bytes of `tables`, what the `process` holds besides, and
    the backbone run by `execution`. An `EngineError` names the minimum where the budget, which
    comes from `source`, is too small."""
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
    division = divide(manifest, bundle.program, execution, bundle.graphs)
    held = requests.tokens(context)
    whole = MemoryPlan(
        context=context,
        requests=requests.count,
        held=held,
        budget=budget,
        onnxruntime=division.needs_onnxruntime,
        backbone=division.backbone_bytes() + TOKENIZER * tokenizer,
        state=_state(division, context, requests.count, held),
        workspace=_workspace(manifest, context, division)
        + _more_requests(manifest, context, division, requests.count - 1)
        + tables
        + (READING * context if tokenizer else 0),
        prefill=_prefill(manifest, context, division),
        lent=0,
        record=record,
        capacity=sum(layer.experts for layer in layers),
        experts=sum(layer.experts for layer in layers),
        smallest=max(layer.top_k for layer in layers),
        token_cycle=sum(layer.top_k for layer in layers),
        process=process,
        source=source or _stated(budget),
    )
    return whole if budget is None else _within(whole, budget)


def _state(division: Division, context: int, requests: int, held: int) -> int:
    """What so many sequences remember of `held` tokens: most where each has its part, since windows
    forget."""
    each = division.held_bytes(-(-held // requests), context)
    return max(division.state_bytes(context), requests * each)


def _more_requests(manifest: Manifest, context: int, division: Division, more: int) -> int:
    """What so many sequences take on their way beside the first one: each a row of everything,
    logits as they are made and drawn from, and its ids; and a prompt that is read beside another
    one, a chunk of rows."""
    row = max(slot_bytes(layer) for layer in manifest.layers) + division.token_bytes(context)
    each = row + 8 * manifest.model.vocabulary + IDS * context
    return more * each + (_chunk(manifest, division) * row if more else 0)


def _stated(budget: int | None) -> Source:
    if budget is None:
        return Source("no budget stated", "No budget")
    return Source(f"of {show_size(budget)} stated", f"A budget of {show_size(budget)}")


def _within(whole: MemoryPlan, budget: int) -> MemoryPlan:
    """A plan that has room for everything, cut down to `budget` bytes; an `EngineError` if that
    cannot be."""
    room, record = budget - whole.fixed, whole.record
    smallest, experts = whole.smallest, whole.experts
    if room < smallest * record:
        raise whole.too_small()
    least = min(
        whole.prefill,
        (budget - whole.process) // PREFILL_SHARE,
        max(0, room - whole.token_cycle * record),
    )
    capacity = _resident(room, least, record, smallest, experts)
    prefill, lent = _lent(room, whole.prefill, record, smallest, capacity, experts)
    return replace(whole, capacity=capacity, prefill=prefill, lent=lent)


def memory_for(
    bundle: Bundle,
    experts: int,
    context: int | None = None,
    level: int | None = None,
    tables: int = 0,
    process: int = 0,
    execution: Execution = AUTO,
    requests: Requests = ONE,
) -> int:
    """The least budget, in bytes, in which so many `experts` stay; the rest as in `plan_memory`.
    More memory never holds fewer."""
    whole = plan_memory(bundle, None, context, level, tables, process, None, execution, requests)
    low, high = whole.minimum, max(whole.minimum, whole.total)
    while low < high:
        middle = (low + high) // 2
        enough = _within(whole, middle).capacity >= experts
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


def _prefill(manifest: Manifest, context: int, division: Division) -> int:
    """What a prompt of `context` tokens keeps beyond its first chunk: what passes between segments,
    and what the experts of one layer receive and give, by slot."""
    tokens = max(0, min(context, PREFILL_CHUNKS * CHUNK) - _chunk(manifest, division))
    slots = max(slot_bytes(layer) for layer in manifest.layers)
    return tokens * (slots + division.token_bytes(context))


def state_line(bundle: Bundle, context: int | None = None, execution: Execution = AUTO) -> str:
    """For people: what a bundle remembers of a token, and of a sequence of `context` tokens."""
    division = divide(bundle.manifest, bundle.program, execution)
    longest = bundle.manifest.model.context
    kept, windowed = division.token_state()
    context = min(2048, longest) if context is None else context
    kind = division.kind if division.program and division.program.states else "as its graphs say"
    behind = f", and {windowed} that go behind a window" if windowed else ""
    return (
        f"state: {kind}, {kept} bytes a token{behind}; {show_size(division.state_bytes(context))} "
        f"with a context of {context} (this model takes up to {longest})"
    )


def slot_bytes(layer: Layer) -> int:
    """What a token takes while a layer's experts run: what they receive, what every slot gives, and
    the sum."""
    return 4 * layer.hidden * (layer.top_k + 2)


def default_budget(whole: int, room: int) -> int | None:
    """What to take of the `room` bytes that the process may hold, where nothing is stated: None,
    all experts, if `whole` bytes leave a reserve of them; otherwise what is there less that
    reserve."""
    allowed = room - room // RESERVE
    return None if whole <= allowed else allowed


def _workspace(manifest: Manifest, context: int, division: Division) -> int:
    """Intermediate values of one chunk: what every slot gives, what the kernels hold of the slots
    in one call, and what the backbone does."""
    tokens, layers = _chunk(manifest, division), manifest.layers
    slots = min(SLOTS + tokens, tokens * max(layer.top_k for layer in layers))
    kernels = slots * max(8 * layer.hidden + 10 * layer.width for layer in layers)
    outputs = tokens * max(layer.hidden * (32 + 8 * layer.top_k) for layer in layers)
    return kernels + outputs + division.workspace(context, tokens)


def _chunk(manifest: Manifest, division: Division) -> int:
    return chunk_tokens(manifest, division.needs_onnxruntime)


def chunk_tokens(manifest: Manifest, onnx: bool = True) -> int:
    """How many tokens of a prompt run at once; `onnx`: whether graphs of any segment do, which may
    take one at a time."""
    return 1 if onnx and manifest.backbone.one_at_a_time else CHUNK
