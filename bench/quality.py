"""What experts lose in few bits, token by token, beside other quantisers at equal bytes.

Only weights differ: every candidate's experts are decoded to float32 and run by transformers, so
that no engine's arithmetic is in a figure. Candidates that learn from text learn from the same
text: calibrated codes and GPTQ from second moments, llama.cpp's quantisers from an importance
matrix (the mean square of each input, per expert).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench import options
from bench.harness import Rows, Run, Table, bench, note, option
from bench.models import CALIBRATION, EXAMPLE
from smoe.artifacts import nested, open_bundle
from smoe.artifacts.encodings import decode_expert, record_layout
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.shard import shard_start

ENCODINGS = (
    "nested:2+1+1:128", "nested:2+1+1:64", "nested:2+1+1:32", "nested:3+1:128",
    "nested:5+1+1+1:128", "nested:2:128", "nested:3:128", "nested:4:128",
)  # fmt: skip
GPTQ = ((4, 128), (3, 128), (2, 128))  # bits and columns of a group
BLOCKS = {"q4_0": 4.5, "iq4_nl": 4.5, "q5_0": 5.5, "q8_0": 8.5}  # bits of a weight, with scales
BATCH = 8  # rows
BASELINE = "Q4_0, importance"

Layer = dict[str, np.ndarray]  # gate, up, down float32 [E, n_out, n_in]


@dataclass(frozen=True)
class Candidate:
    """Experts to judge: bits of a weight, scales counted, and every layer's matrices."""

    name: str
    bits: float
    layers: Callable[[], list[Layer]]


@bench(
    options.TEXT, options.tokens(32768),
    option("--model", type=Path, default=EXAMPLE, help="a checkpoint of qwen3_moe"),
    option("--calibration", type=Path, default=CALIBRATION, help="what quantisers learn from"),
    option("--calibration-tokens", type=int, default=65536),
    option("--encodings", nargs="*", default=ENCODINGS, help="nested encodings"),
    option("--blocks", nargs="*", choices=BLOCKS, default=list(BLOCKS), help="of llama.cpp"),
    option("--priced", type=Path, help="a bundle with prices, for levels by layer and by expert"),
)  # fmt: skip
def quality(run: Run) -> Rows:
    """KL of experts in few bits at equal bytes: every level, GPTQ, and llama.cpp's quantisers.

    ± is 1.96 standard errors, of the mean and of the paired difference to llama.cpp's Q4_0 with an
    importance matrix. Its quantisers need pip install llama-cpp-python gguf.
    """
    from smoe.prep.checkpoint.checkpoint import open_checkpoint
    from smoe.prep.checkpoint.text import Calibration

    rows = Calibration(str(run.text), run.tokens).rows(open_checkpoint(run.model))
    judge = Judge(run.model, rows)
    losses: dict[str, np.ndarray] = {}
    bits: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for candidate in _candidates(run, judge.original, Path(scratch)):
            losses[candidate.name] = judge.kl(candidate.layers())
            bits[candidate.name] = candidate.bits
            note(f"{candidate.name}: {losses[candidate.name].mean():.5f}")
    columns = {"": "{}", "bits per weight, with scales": "{:.3f}", "KL": "{:.4f} ± {:.4f}",
               f"less {BASELINE}": "{:+.4f} ± {:.4f}"}  # fmt: skip
    base = losses.get(BASELINE)
    lines = [
        [name, bits[name], _mean(kl), None if base is None else _mean(kl - base)]
        for name, kl in sorted(losses.items(), key=lambda item: (bits[item[0]], item[1].mean()))
    ]
    title = f"{run.tokens} tokens of {run.text.name}; learnt from {run.calibration.name}"
    yield Table("quality", columns, lines, title)


def _mean(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)]


def _candidates(run: Run, original: list[Layer], scratch: Path) -> Iterator[Candidate]:
    for encoding in run.encodings:
        for quantiser in ("calibrated", "nearest"):
            if quantiser == "calibrated" or encoding == run.encodings[0]:
                yield from _ours(run, original, encoding, quantiser, scratch)
    if run.priced:
        yield from _priced(run.priced, original)
    learnt = Learnt.of(run.model, run.calibration, run.calibration_tokens)
    yield from _gptq(original, learnt)
    yield from _llama(run.blocks, original, learnt)


# -- who judges -----------------------------------------------------------------------


class Judge:
    """A model in float32 whose experts are replaced, against itself as it was."""

    def __init__(self, model: Path, rows: list[np.ndarray]):
        import torch
        import transformers

        classes = transformers.AutoModelForCausalLM
        self._model = classes.from_pretrained(model, dtype=torch.float32).eval()
        self._rows = rows
        modules = self._model.modules()
        self._experts = [module for module in modules if hasattr(module, "gate_up_proj")]
        self.original = [_matrices(module) for module in self._experts]
        self._truth = list(self._log_likelihoods())

    def kl(self, layers: list[Layer]) -> np.ndarray:
        """KL divergence of every token's successors, original to replaced: float64 `[tokens]`."""
        import torch

        for module, layer in zip(self._experts, layers, strict=True):
            both = np.concatenate([layer["gate"], layer["up"]], axis=1)
            module.gate_up_proj.data = torch.from_numpy(both)
            module.down_proj.data = torch.from_numpy(np.ascontiguousarray(layer["down"]))
        pairs = zip(self._truth, self._log_likelihoods(), strict=True)
        parts = [(p.exp() * (p - q)).sum(-1).double().flatten() for p, q in pairs]
        return torch.cat(parts).numpy()

    def _log_likelihoods(self):
        import torch

        from smoe.prep.sweep.forward import batches_of

        with torch.no_grad():
            for batch in batches_of(self._rows, BATCH):
                ids = torch.from_numpy(batch)
                yield self._model(ids, use_cache=False).logits.log_softmax(-1)


def _matrices(module) -> Layer:
    gate, up = np.split(module.gate_up_proj.detach().numpy(), 2, axis=1)
    return {"gate": gate, "up": up, "down": module.down_proj.detach().numpy()}


# -- the candidates --------------------------------------------------------------------


def _ours(
    run: Run, original: list[Layer], encoding: str, quantiser: str, scratch: Path
) -> Iterator[Candidate]:
    """Every level of an encoding, as `smoe-prep pack` writes it."""
    packed = scratch / f"{encoding.replace(':', '-')}-{quantiser}"
    text = ["--calibration", run.calibration, "--tokens", run.calibration_tokens]
    command = ["pack", run.model, "-o", packed, "--encoding", encoding, "--quantiser", quantiser]
    command += text if quantiser == "calibrated" else []
    subprocess.run([sys.executable, "-m", "smoe.prep", *map(str, command)], check=True)
    about = json.loads((packed / "experts.json").read_text("utf-8"))
    parsed, page = nested.parse(about["encoding"]), about["page"]

    def layers(level: int) -> list[Layer]:
        return list(_decoded(packed / "experts", about["encoding"], page, original, level))

    for level in range(1, parsed.levels + 1):
        split = "+".join(map(str, parsed.split.planes))
        name = f"{split}:{parsed.group} {quantiser}, level {level}"
        bits = parsed.split.bits(level) + 16 / parsed.group
        yield Candidate(name, bits, lambda n=level: layers(n))


def _decoded(
    shards: Path, encoding: str, page: int, original: list[Layer], level: int
) -> Iterator[Layer]:
    """Every layer's experts at a level, from the folder of their shards."""
    for shard, layer in zip(sorted(shards.iterdir()), original, strict=True):
        count, hidden, width = layer["down"].shape
        shape = ExpertShape(hidden, width, True, False, False)
        layout = record_layout(shape, encoding, page)
        start = shard_start(shard, layout, page, count)
        records = np.fromfile(shard, np.uint8, offset=start).reshape(count, layout.nbytes)
        decoded = [decode_expert(shape, layout, encoding, record, level) for record in records]
        yield {name: np.stack([expert[name] for expert in decoded]) for name in layer}


def _priced(bundle: Path, original: list[Layer]) -> Iterator[Candidate]:
    """Levels given to layers, or to single experts, by the bundle's prices: as many bytes as every
    level but the first and the last has for all."""
    opened = open_bundle(bundle)
    about, tables = opened.manifest.experts, opened.tables.layers()
    parsed = nested.parse(about.encoding)
    bits = [parsed.split.bits(n) for n in range(1, parsed.levels + 1)]
    decoded = [
        list(_decoded(bundle / "experts", about.encoding, about.page, original, n))
        for n in range(1, parsed.levels + 1)
    ]
    # Over the calibration text, every slot at its expert's mean weight: [layers, experts, levels].
    costs = np.stack([
        (t["gate_mass"] ** 2 / np.maximum(t["counts"], 1))[:, None] * t["price_level"]
        for t in tables
    ])  # fmt: skip
    count = costs.shape[1]

    def layers(levels: np.ndarray) -> list[Layer]:
        """Of levels int64 `[layers, experts]`, from 0."""
        return [
            {name: np.stack([decoded[n][i][name][e] for e, n in enumerate(row)]) for name in layer}
            for i, (layer, row) in enumerate(zip(original, levels, strict=True))
        ]

    for level in range(1, parsed.levels - 1):
        size = bits[level] + 16 / parsed.group
        whole = cheapest(costs.sum(1), bits, bits[level])[:, None].repeat(count, 1)
        single = cheapest(costs.reshape(-1, len(bits)), bits, bits[level]).reshape(-1, count)
        for name, levels in (("layers", whole), ("experts", single)):
            title = f"levels of {name} by prices, as level {level + 1}"
            yield Candidate(title, size, lambda levels=levels: layers(levels))


def cheapest(costs: np.ndarray, bits: Sequence[int], mean: float) -> np.ndarray:
    """Levels int64 `[n]`, from 0, of things that cost `costs` `[n, levels]` and take `bits` each:
    from the lowest on, the step that saves most per bit, until the mean of bits would exceed
    `mean`."""
    levels, left = np.zeros(len(costs), np.int64), (mean - bits[0]) * len(costs)
    while True:
        steps = [
            ((costs[i, n] - costs[i, m]) / (bits[m] - bits[n]), i, m)
            for i, n in enumerate(levels)
            for m in range(n + 1, len(bits))
            if bits[m] - bits[n] <= left
        ]
        if not steps:
            return levels
        _, i, m = max(steps)
        left -= bits[m] - bits[levels[i]]
        levels[i] = m


def _gptq(original: list[Layer], learnt: Learnt) -> Iterator[Candidate]:
    import torch

    from bench.gptq import gptq

    def layers(bits: int, group: int) -> Iterator[Layer]:
        for layer, outer, inner in zip(original, learnt.outer, learnt.inner, strict=True):
            yield {
                name: gptq(
                    torch.from_numpy(w), torch.from_numpy(inner if name == "down" else outer),
                    bits, group,
                ).numpy()
                for name, w in layer.items()
            }  # fmt: skip

    for bits, group in GPTQ:
        name = f"GPTQ, {bits} bits in groups of {group}"
        yield Candidate(name, bits + 16 / group, lambda b=bits, g=group: list(layers(b, g)))


def _llama(kinds: list[str], original: list[Layer], learnt: Learnt) -> Iterator[Candidate]:
    """llama.cpp's quantisers of blocks of 32, with and without an importance matrix."""
    missing = [m for m in ("llama_cpp", "gguf") if importlib.util.find_spec(m) is None]
    if missing:
        note(f"llama.cpp's quantisers are left out: {', '.join(missing)} is not installed.")
        return
    quantise = _llama_quantiser()

    def layers(kind: str, informed: bool) -> Iterator[Layer]:
        for layer, outer, inner in zip(original, learnt.outer, learnt.inner, strict=True):
            squares = dict.fromkeys(("gate", "up"), _diagonals(outer)) | {"down": _diagonals(inner)}
            yield {
                name: np.stack([
                    quantise(kind, matrix, importance if informed else None)
                    for matrix, importance in zip(w, squares[name], strict=True)
                ])
                for name, w in layer.items()
            }  # fmt: skip

    for kind in kinds:
        for informed in (False, True):
            name = kind.upper() + (", importance" if informed else "")
            yield Candidate(name, BLOCKS[kind], lambda k=kind, i=informed: list(layers(k, i)))


def _diagonals(moments: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.diagonal(moments, axis1=1, axis2=2), np.float32)


def _llama_quantiser() -> Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]:
    """A function that gives a matrix float32 `[n_out, n_in]` as it comes back from a type of
    llama.cpp, quantised by its own library with the mean squares of its inputs, or without."""
    import gguf
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.so*"))))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    floats, size = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats]

    def quantise(kind: str, w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        number = gguf.GGMLQuantizationType[kind.upper()]
        w = np.ascontiguousarray(w, np.float32)
        out = np.zeros(gguf.quant_shape_to_byte_shape(w.shape, number), np.uint8)
        weights = None if importance is None else importance.ctypes.data_as(floats)
        chunk(number, w.ctypes.data_as(floats), out.ctypes.data, 0, *w.shape, weights)
        return gguf.dequantize(out, number)

    return quantise


@dataclass
class Learnt:
    """What quantisers learn from the calibration text, per layer: second moments E[x x^T] of what
    experts receive (`outer`, float32 `[E, H, H]`) and of what their last matrices do (`inner`,
    float32 `[E, W, W]`). An expert that no token reached has the identity."""

    outer: list[np.ndarray] = field(default_factory=list)
    inner: list[np.ndarray] = field(default_factory=list)
    name: str = "moments"

    @classmethod
    def of(cls, model: Path, calibration: Path, tokens: int) -> Learnt:
        from smoe.prep.checkpoint.checkpoint import open_checkpoint
        from smoe.prep.checkpoint.text import Calibration
        from smoe.prep.sweep.forward import sweep

        checkpoint, learnt = open_checkpoint(model), cls()
        sweep(checkpoint, Calibration(str(calibration), tokens).rows(checkpoint), [learnt])
        return learnt

    def visit(self, at) -> dict[str, np.ndarray]:
        import torch

        from smoe.prep.checkpoint.seam import expert_geometry, expert_inner

        experts, hidden, width = expert_geometry(at.module)
        outer = torch.eye(hidden).repeat(experts, 1, 1)
        inner = torch.eye(width).repeat(experts, 1, 1)
        for expert in range(experts):
            x = at.hidden[torch.where(at.ids == expert)[0]]
            if len(x):
                between = expert_inner(at.module, expert, x)
                outer[expert], inner[expert] = x.T @ x / len(x), between.T @ between / len(x)
        self.outer.append(outer.numpy())
        self.inner.append(inner.numpy())
        return {}

    def resume(self, at, known) -> None:
        self.visit(at)

    def finish(self) -> list[dict[str, np.ndarray]]:
        return []
