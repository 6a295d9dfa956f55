"""Segments in ONNX Runtime: one session each, their weights, and what they remember.

Weights are read once into memory that this process owns and are shared by these segments: a file
that shrinks under a running engine can then not kill it, and the bytes are counted exactly. State
that grows in place is one buffer of the context's length, bound as input and output of its segment,
so that a step appends without copying."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from smoe.artifacts.errors import first_line
from smoe.artifacts.manifest import Manifest, State
from smoe.artifacts.safetensors_file import DTYPES
from smoe.runtime.errors import EngineError
from smoe.runtime.execution import runs_of, weights_of
from smoe.runtime.machine import processors
from smoe.runtime.step import Kinds

ITEM_BYTES = {"tensor(bool)": 1, "tensor(float16)": 2, "tensor(float)": 4, "tensor(int32)": 4}

Values = dict[str, ort.OrtValue]

# ONNX Runtime's exceptions have no base of their own.
ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
EMPTY = Path(__file__).resolve().parents[1] / "no_data"
LARGE = 8 << 20  # bytes of a weight from which on a second thread pays (bench/threads.py)

_arena_made = False
_open: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child, which has none of their threads: a session that ended there, even as the
    interpreter ends, would wait for them for ever. So these never do."""
    for session in _open:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _share_arena() -> None:
    """One arena for all segments of the process: with one each, every session keeps its own
    peak."""
    global _arena_made
    if not _arena_made:
        info = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        # Strategy 0 grows in powers of two: requests that grow with the context then find what was
        # freed before.
        ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 0}))
        _arena_made = True


def session_options(threads: int, prepack: bool = False) -> ort.SessionOptions:
    """How every segment runs. The choices and their figures are in docs/log.md (2026-11-21)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle workers that spin take the cores from the segment that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A second copy of every weight, which MatMulNBits needs to be fast, and float products hardly
    # gain from.
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.log_severity_level = 4  # what fails is raised
    return options


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over `array`'s own memory; the caller keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class SegmentState:
    """What the segments remember of one sequence (`step.SequenceState`): ONNX Runtime's values by
    the name of the input that receives them.

    State that grows in place lies in one buffer of `context` tokens, and what is behind a
    sequence's length is overwritten before it is read. Other state is replaced, never written to,
    so that an older one is kept by keeping its values."""

    def __init__(self, specs: tuple[State, ...], context: int):
        self._specs, self._context = specs, context
        self.values: Values = {}
        self._clear()

    def rewind(self, length: int) -> int:
        """All or nothing, unless all of it grows in place."""
        if all(spec.in_place for spec in self._specs):
            return length
        self._clear()
        return 0

    def fork(self, length: int) -> SegmentState:
        """Buffers are copied whole; what is replaced is shared."""
        copy = SegmentState(self._specs, self._context)
        for spec in self._specs:
            if spec.in_place:
                copy.values[spec.input].numpy()[...] = self.values[spec.input].numpy()
            else:
                copy.values[spec.input] = self.values[spec.input]
        return copy

    def snapshot(self, length: int) -> Values:
        """The values themselves: those that are replaced are never written to, the others only
        behind the length."""
        return dict(self.values)

    def restore(self, snapshot: object) -> None:
        assert isinstance(snapshot, dict)
        self.values = snapshot

    def arrays(self, length: int) -> Iterator[tuple[str, np.ndarray]]:
        """By the number of a state; of a buffer that grows in place what is filled."""
        for number, spec in enumerate(self._specs):
            yield f"{number}.value", self._filled(spec, length)

    def check(self, kinds: Kinds, length: int) -> None:
        wanted = {
            f"{number}.value": (DTYPES[spec.dtype], _shape(spec, length))
            for number, spec in enumerate(self._specs)
        }
        if kinds != wanted:
            raise EngineError(f"Its arrays are not the state of {length} tokens of this backbone.")

    def load(self, arrays: Mapping[str, np.ndarray], length: int) -> None:
        for number, spec in enumerate(self._specs):
            array = arrays[f"{number}.value"]
            if spec.in_place:
                self._filled(spec, length)[...] = array
            else:
                self.values[spec.input] = ort_value(np.array(array))

    def _filled(self, spec: State, length: int) -> np.ndarray:
        """A view."""
        value: np.ndarray = self.values[spec.input].numpy()
        places = [slice(None)] * value.ndim
        if spec.in_place and spec.growing >= 0:
            places[spec.growing] = slice(length)
        return value[tuple(places)]

    def _clear(self) -> None:
        for spec in self._specs:
            if spec.in_place and spec.input in self.values:
                continue
            shape = _shape(spec, self._context if spec.in_place else 0)
            self.values[spec.input] = ort_value(np.zeros(shape, DTYPES[spec.dtype]))


def _shape(spec: State, length: int) -> tuple[int, ...]:
    """Of a state of so many tokens."""
    return tuple(length if axis == spec.growing else size for axis, size in enumerate(spec.shape))


def segment_threads(manifest: Manifest, index: int, threads: int | None) -> int:
    """How many threads run a segment: `threads`, or as many as pay by the size of its largest
    weight and as there are processors for."""
    nbytes = {w.name: w.nbytes for w in manifest.backbone.initializers}
    largest = max((nbytes[name] for name in manifest.backbone.segments[index].weights), default=0)
    return threads or (min(2, processors().count) if largest >= LARGE else 1)


def open_sessions(
    path: Path, manifest: Manifest, threads: dict[int, int]
) -> tuple[dict[int, ort.InferenceSession], Values]:
    """A session on so many `threads` for each of these segments of the bundle at `path`, and their
    weights, which must live as long. An `EngineError` if one does not load."""
    _share_arena()
    weights = _read_weights(path, manifest, threads)
    with _folder_with_empty(Path(manifest.backbone.weights).name) as folder:
        sessions = {
            index: _session(path, manifest, index, count, weights, folder)
            for index, count in threads.items()
        }
    return sessions, weights


@contextlib.contextmanager
def _folder_with_empty(name: str) -> Iterator[str]:
    """A folder where the file `name` is empty. Weights come from memory alone: ONNX Runtime would
    map whatever file an untrusted graph names, and a mapped file that shrinks kills the process, so
    this is what it is shown. The one that comes with this package has the name that every bundle of
    ours gives its weights, and needs no place to write to."""
    ours = EMPTY / name
    if ours.is_file() and not ours.is_symlink() and not ours.stat().st_size:
        yield str(EMPTY)
        return
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as error:
        raise EngineError(
            f"There is no folder for temporary files ({error.strerror}), which this bundle needs "
            f"since its weights are called {name}; set TMPDIR to one, or build the bundle again."
        ) from error
    with made as folder:
        (Path(folder) / name).touch()
        yield folder


def _session(
    path: Path, manifest: Manifest, index: int, threads: int, weights: Values, external: str
) -> ort.InferenceSession:
    segment = manifest.backbone.segments[index]
    options = session_options(threads, prepack=manifest.backbone.precision != "f32")
    options.add_session_config_entry(EXTERNAL_FOLDER, external)
    for name in segment.weights:  # shared; external initializers would be copied
        options.add_initializer(name, weights[name])
    file = path / segment.file
    try:
        session = ort.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except (*ORT_ERRORS, OSError) as error:
        raise EngineError(
            f"{file} does not load in ONNX Runtime {ort.__version__}: {first_line(error)}"
        ) from error
    _open.add(session)
    return session


@dataclass(frozen=True, eq=False)
class TwoValued:
    """A float32 array of two values, as a mask is: a bit for each, exact to the bit."""

    bits: np.ndarray
    values: np.ndarray  # uint32, for the bits 0 and 1
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> TwoValued | None:
        """None where there are more values."""
        flat = array.reshape(-1).view(np.uint32)
        if not flat.size:
            return None
        second = flat != flat[0]
        values = flat[[0, int(second.argmax())]]
        if not np.array_equal(flat == values[1], second) and second.any():
            return None
        return cls(bits=np.packbits(second), values=values, shape=array.shape)

    def value(self) -> ort.OrtValue:
        """The array again."""
        second = np.unpackbits(self.bits, count=math.prod(self.shape))
        return ort_value(self.values[second].view(np.float32).reshape(self.shape))


def _read_weights(path: Path, manifest: Manifest, segments: Iterable[int]) -> Values:
    """Those of these segments."""
    file, weights = path / manifest.backbone.weights, {}
    wanted = weights_of(manifest, segments)
    for start, end in runs_of(wanted):
        data = np.fromfile(file, np.uint8, end - start, offset=start)
        if data.size != end - start:
            raise EngineError(f"{file} became shorter while it was read; copy the bundle again.")
        for w in wanted:
            if start <= w.offset < end:
                piece = data[w.offset - start :][: w.nbytes]
                weights[w.name] = ort_value(piece.view(DTYPES[w.dtype]).reshape(w.shape))
    return weights


def value_bytes(kind: str, shape: list[int | str | None], left: list[int], length: int) -> int:
    """Bytes of a value of ONNX Runtime's type and shape: its open axes are as long as `left` says,
    further ones `length`."""
    total = ITEM_BYTES.get(kind, 8)
    for size in shape:
        total *= size if isinstance(size, int) else left.pop() if left else length
    return total
