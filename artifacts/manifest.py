"""manifest.json as frozen dataclasses: what a bundle holds and how its parts fit together.

The classes are the schema. `Manifest.parse` accepts exactly these fields with exactly these types,
and answers anything else with a sentence that names the field; `to_json` writes them. What the
fields mean is in FORMAT.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from smoe.artifacts import schema
from smoe.artifacts.errors import BundleError
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.safetensors_file import DTYPES

FORMAT = "smoe"
VERSION = 8
STUDY, STUDY_SINCE = (
    "study",
    4,
)  # the folder of what only people and `plan` read, and its first version


@dataclass(frozen=True)
class Model:
    """The source model. `context` is the longest sequence it was made for; `end_ids` end a
    generation."""

    model_type: str
    architecture: str
    vocabulary: int
    context: int
    end_ids: tuple[int, ...]


# The names of an `ExpertActivation`. What they compute is in runtime/kernels/activations.py and
# native/gate.h.
KINDS = ("gated", "plain", "clamped", "bounded", "softcapped")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity")


@dataclass(frozen=True)
class ExpertActivation:
    """How an expert's first matrices become the input of its last (formulas in FORMAT.md), one of
    `KINDS` with one of `ACTIVATIONS` where the kind takes one. Its JSON key is "gate", which is no
    router's.

    kind "gated": act(gate) * up. kind "plain": act(up). kind "clamped": gate' = min(gate, limit),
    up' = clip(up, -limit, limit), (up' + 1) * gate' * sigmoid(alpha * gate'). kind "bounded":
    act(gate') * up'. kind "softcapped": limit * tanh(gate / limit) * sigmoid(gate) * alpha *
    tanh(up / alpha).
    """

    kind: str
    activation: str
    alpha: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True)
class Routing:
    """How ids and mixing weights follow from the scores (FORMAT.md, "Routing"): ids are the top k
    of the selection scores; weights are the raw weights at ids, normalised ("none", "sum" or
    "softmax"; "sum" divides by sum + epsilon), times scale."""

    normaliser: str
    scale: float
    epsilon: float


@dataclass(frozen=True)
class Wires:
    """Names of the values that pass between segments and experts. `scores` and `raw` are empty
    without a `Routing`."""

    hidden: str
    ids: str
    weights: str
    output: str
    scores: str
    raw: str


@dataclass(frozen=True)
class Layer:
    """One MoE layer. Its experts run after the segment of the same number and before the next
    one; after the segment one further where the backbone has a prelude."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    wires: Wires
    routing: Routing | None
    routing_refusal: str  # why `routing` is null, for the user; empty otherwise


@dataclass(frozen=True)
class State:
    """What a segment remembers from one call to the next: `input` receives what `output` gave.

    `growing` is the axis that grows with every token, or -1. With `in_place` one buffer of the
    context's length along that axis is bound to both; otherwise the output replaces the input.
    """

    segment: int
    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    growing: int
    in_place: bool

    def nbytes(self, context: int) -> int:
        """Bytes for sequences of `context` tokens. State that is replaced exists twice while a
        segment runs."""
        sizes = (context if axis == self.growing else size for axis, size in enumerate(self.shape))
        return math.prod(sizes) * DTYPES[self.dtype].itemsize * (1 if self.in_place else 2)


@dataclass(frozen=True)
class Segment:
    """One ONNX graph of the backbone: its file in the bundle, the names it takes and gives, and
    those of its initializers that lie in the weight file."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Initializer:
    """A weight of the backbone: `offset` and `nbytes` in the weight file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


STATE_KINDS = ("int8", "f16", "f32")  # the narrowest first; "" where none was chosen


@dataclass(frozen=True)
class Backbone:
    """Everything but the experts. `heads` is the number of attention heads, for the memory plan.
    `one_at_a_time` says that a call takes exactly one token. `prelude` says that segment 0 comes
    before the first layer's: embedding, positions, masks and rotary tables alone. `state_kind`, one
    of `STATE_KINDS`, is what its program keeps keys and values in."""

    precision: str
    heads: int
    weights: str
    segments: tuple[Segment, ...]
    initializers: tuple[Initializer, ...]
    state: tuple[State, ...]
    one_at_a_time: bool = dataclasses.field(default=False, metadata={"since": 2})
    prelude: bool = dataclasses.field(default=False, metadata={"since": 6})
    state_kind: str = dataclasses.field(default="", metadata={"since": 7})


@dataclass(frozen=True)
class Experts:
    """What all shards have in common: encoding, page size in bytes, gate, whether matrices have
    biases, and whether an expert's output is normalised (FORMAT.md, "Gate")."""

    encoding: str
    page: int
    gate: ExpertActivation
    biased: bool
    normed: bool = dataclasses.field(default=False, metadata={"since": 2})

    def shape(self, hidden: int, width: int) -> ExpertShape:
        """The geometry of an expert of these sizes."""
        return ExpertShape(hidden, width, self.gate.kind != "plain", self.biased, self.normed)


@dataclass(frozen=True)
class File:
    """Size in bytes and SHA-256 of a file. The hash proves integrity, not origin."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json."""

    format: str
    version: int
    model: Model
    layers: tuple[Layer, ...]
    experts: Experts
    backbone: Backbone
    provenance: dict[str, str]
    files: dict[str, File]

    def expert_shape(self, layer: int) -> ExpertShape:
        """The geometry of an expert of MoE layer `layer`."""
        return self.experts.shape(self.layers[layer].hidden, self.layers[layer].width)

    @staticmethod
    def shard(layer: int) -> str:
        """The shard of a layer, relative to the bundle."""
        return f"experts/layer-{layer:02d}.safetensors"

    @property
    def study(self) -> str:
        """Where in the bundle the files lie that need not travel with it: "study/", or among the
        others before version 4."""
        return f"{STUDY}/" if self.version >= STUDY_SINCE else ""

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, where: str) -> Manifest:
        """Read manifest.json; `where` names the file in errors. A wrong field or type is a
        `BundleError`."""
        data = schema.load(text, where)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{where} does not say format {FORMAT!r}; this is not a smoe bundle.")
        if type(data.get("version")) is not int or not 1 <= data["version"] <= VERSION:
            raise BundleError(
                f"{where} has format version {data.get('version')!r}, this smoe reads 1 to "
                f"{VERSION}; "
                "upgrade smoe, or build the bundle again with it."
            )
        return schema.parse(cls, data, where)
