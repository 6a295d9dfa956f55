"""The backbone: segments in ONNX Runtime, and the state of each sequence.

Weights are read once into memory that this process owns and are shared by all segments: a file that shrinks under a
running engine can then not kill it, and the bytes are counted exactly. State that grows in place is one buffer of the
context's length, bound as input and output of its segment, so that a step appends without copying.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from smoe.artifacts.errors import first_line
from smoe.artifacts.manifest import Manifest, State
from smoe.artifacts.safetensors_file import DTYPES
from smoe.runtime.errors import EngineError

Values = dict[str, ort.OrtValue]

# ONNX Runtime's exceptions have no base of their own.
ORT_ERRORS = (
    ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NoModel, ort_errors.NoSuchFile, ort_errors.NotImplemented, ort_errors.RuntimeException,
    RuntimeError, ValueError,
)  # fmt: skip

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
LARGE = 8 << 20  # bytes of a weight from which on a second thread pays (bench/threads.py)

_arena_made = False


def _share_arena() -> None:
    """One arena for all segments of the process: with one each, every session keeps its own peak."""
    global _arena_made
    if not _arena_made:
        info = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        # Strategy 0 grows in powers of two: requests that grow with the context then find what was freed before.
        ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 0}))
        _arena_made = True


def session_options(threads: int, prepack: bool = False) -> ort.SessionOptions:
    """How every segment runs. The choices and their figures are in docs/log.md (2026-11-21)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle workers that spin take the cores from the segment that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A second copy of every weight, which MatMulNBits needs to be fast, and float products hardly gain from.
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.log_severity_level = 4  # what fails is raised
    return options


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over `array`'s own memory; the caller keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class Sequence:
    """What one request has consumed: its token ids, and the state that the segments left."""

    def __init__(self, state: tuple[State, ...], context: int):
        self.ids: list[int] = []
        self._spec = state
        self._context = context
        self._arrays: dict[str, np.ndarray] = {}
        self.state: Values = {}
        self.reset()

    def reset(self) -> None:
        """Back to nothing consumed."""
        self.ids = []
        for spec in self._spec:
            shape = list(spec.shape)
            if spec.growing >= 0:
                shape[spec.growing] = self._context if spec.in_place else 0
            if spec.input not in self._arrays or not spec.in_place:
                self._arrays[spec.input] = np.zeros(shape, DTYPES[spec.dtype])
                self.state[spec.input] = ort_value(self._arrays[spec.input])

    @property
    def length(self) -> int:
        return len(self.ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; state that cannot be shortened is rebuilt from nothing, so look
        at `length` afterwards."""
        if length < self.length:
            if all(spec.in_place for spec in self._spec):
                del self.ids[length:]  # what lies behind is overwritten before it is read
            else:
                self.reset()


class Backbone:
    """All segments of a bundle. Not thread-safe: one step at a time."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None = None):
        self._segments = manifest.backbone.segments
        self._in_place = {s.output: s.input for s in manifest.backbone.state if s.in_place}
        self._replaced = [
            [s for s in manifest.backbone.state if s.segment == i and not s.in_place]
            for i in range(len(self._segments))
        ]
        self._weights = _read_weights(path, manifest)
        self._prepack = manifest.backbone.precision != "f32"
        nbytes = {w.name: w.nbytes for w in manifest.backbone.initializers}
        self.threads = [
            threads
            or (2 if max((nbytes[name] for name in segment.weights), default=0) >= LARGE else 1)
            for segment in self._segments
        ]
        _share_arena()
        # Weights come from memory alone. ONNX Runtime would map whatever file an untrusted graph names, and a mapped file
        # that shrinks kills the process: so it is shown a folder where the weight file is empty.
        with tempfile.TemporaryDirectory() as empty:
            (Path(empty) / Path(manifest.backbone.weights).name).touch()
            self._sessions = [self._session(path, i, empty) for i in range(len(self._segments))]

    def _session(self, path: Path, index: int, external: str) -> ort.InferenceSession:
        segment = self._segments[index]
        options = session_options(self.threads[index], self._prepack)
        options.add_session_config_entry(EXTERNAL_FOLDER, external)
        for name in segment.weights:
            options.add_initializer(
                name, self._weights[name]
            )  # shared; external initializers would be copied
        try:
            model = (path / segment.file).read_bytes()
            return ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except (*ORT_ERRORS, OSError) as error:
            raise EngineError(
                f"{path / segment.file} does not load in ONNX Runtime {ort.__version__}: {first_line(error)}"
            ) from error

    def begin(self, sequence: Sequence, ids: np.ndarray, keep: np.ndarray) -> Values:
        """The values a step starts from: `ids` int64 `[T]` to consume, `keep` int64 positions whose logits are wanted."""
        return {
            "input_ids": ort_value(ids.reshape(1, -1)),
            "past_length": ort_value(np.array([sequence.length], np.int64)),
            "logits_to_keep": ort_value(keep),
            **sequence.state,
        }

    def run(self, index: int, values: Values, sequence: Sequence, keep: bool = True) -> None:
        """Run segment `index`: its outputs are added to `values`, its state to `sequence`. Without `keep` that state may be
        overwritten: what was written in place lies behind the sequence's length, the rest is forgotten."""
        segment, session = self._segments[index], self._sessions[index]
        try:
            binding = session.io_binding()
            for name in segment.inputs:
                binding.bind_ortvalue_input(name, values[name])
            for name in segment.outputs:
                if name in self._in_place:
                    binding.bind_ortvalue_output(name, sequence.state[self._in_place[name]])
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise EngineError(
                f"Segment {index} of the backbone failed: {first_line(error)}"
            ) from error
        values.update(zip(segment.outputs, binding.get_outputs(), strict=True))
        for spec in self._replaced[index] if keep else ():
            sequence.state[spec.input] = values[spec.output]


def _read_weights(path: Path, manifest: Manifest) -> Mapping[str, ort.OrtValue]:
    file = path / manifest.backbone.weights
    data = np.fromfile(file, np.uint8)  # no longer than its last weight: the door has checked
    found = {}
    for w in manifest.backbone.initializers:
        piece = data[w.offset : w.offset + w.nbytes]
        if piece.size != w.nbytes:
            raise EngineError(f"{file} became shorter while it was read; copy the bundle again.")
        found[w.name] = ort_value(piece.view(DTYPES[w.dtype]).reshape(w.shape))
    return found
