"""Embeddings that stay in their file: the rows of a token are those of the matrix, bit for bit."""

import dataclasses
import os

import numpy as np
import pytest
from support.programs import Layers, same

from smoe.artifacts.program import PROGRAM_WEIGHTS, Part
from smoe.runtime import EngineError, kernels
from smoe.runtime.program.embedding import left_in_file, without
from smoe.runtime.program.plan import plan

NATIVE = kernels.available()[:-1]


class Wordy(Layers):
    """With an embedding that is worth it in each form, and whose last tile is not whole."""

    VOCABULARY = 30_011

    def ids(self, count: int) -> np.ndarray:
        ends = [0, 15, 16, self.VOCABULARY - 1]
        return np.r_[ends, np.random.default_rng(3).integers(0, self.VOCABULARY, count), ends]


@pytest.mark.parametrize("form", ["f32", "bf16", "int8", "int4"])
def test_rows_are_those_of_a_matrix_in_memory(tmp_path, form):
    model = Wordy(form, layers=1)
    assert len(left_in_file(model.program)) == 1
    ids = model.ids(70)
    logits = []
    for name in (NATIVE[0], "reference"):
        executable = model.open(tmp_path, name, wires=model.wires)
        spans = [(executable.state(len(ids), "f32"), 0, ids)]
        logits.append(model.logits(executable, spans, np.arange(0, len(ids), 7)))
    assert same(*logits)


def test_one_that_something_else_reads_is_in_memory():
    model = Wordy("int8", layers=1)
    ((op, constant, _),) = left_in_file(model.program)
    (head,) = (op for op in model.parts[-1] if op.kind == "product")
    tied = dataclasses.replace(head, weight=op.weight)
    parts = [tuple(tied if op is head else op for op in ops) for ops in model.parts]
    program = dataclasses.replace(model.program, parts=tuple(Part(ops) for ops in parts))
    assert left_in_file(program) == []
    shared = dataclasses.replace(constant, name="head")  # the same bytes by another name
    renamed = dataclasses.replace(head, weight="head")
    parts = [tuple(renamed if op is head else op for op in ops) for ops in model.parts]
    program = dataclasses.replace(
        model.program,
        constants=(*model.constants, shared),
        parts=tuple(Part(ops) for ops in parts),
    )
    assert left_in_file(program) == []


def test_what_is_looked_up_has_a_place_of_its_own_until_it_is_read():
    program = Wordy("int8", layers=1).program
    ((op, _, buffer),) = left_in_file(program)
    places = plan(program, ["output 0"])
    assert buffer.name in places.crossing
    assert op not in (without(program, [op]).parts[0].ops or ())


@pytest.mark.parametrize("wrong", [-1, Wordy.VOCABULARY])
def test_ids_that_it_lacks_are_refused(tmp_path, wrong):
    model = Wordy("int8", layers=1)
    executable = model.open(tmp_path, NATIVE[0], wires=model.wires)
    ids = np.array([3, wrong])
    with pytest.raises(EngineError, match=f"Token id {wrong} is not one of"):
        executable.begin([(executable.state(9, "f32"), 0, ids)], np.array([1]))


def test_a_file_that_became_shorter_ends_the_step(tmp_path):
    model = Wordy("int8", layers=1)
    executable = model.open(tmp_path, NATIVE[0], wires=model.wires)
    ((_, constant, _),) = left_in_file(model.program)
    os.truncate(tmp_path / PROGRAM_WEIGHTS, constant.offset + constant.nbytes - 4)
    ids = np.array([model.VOCABULARY - 1])
    with pytest.raises(EngineError, match="became shorter"):
        executable.begin([(executable.state(9, "f32"), 0, ids)], np.array([0]))
    ids[0] = 5  # what is there can still be read
    executable.begin([(executable.state(9, "f32"), 0, ids)], np.array([0]))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux alone counts files so")
def test_released_programs_leave_no_file_open(tmp_path):
    model = Wordy("int8", layers=1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        executable = model.open(tmp_path, NATIVE[0], wires=model.wires)
        executable.begin([(executable.state(9, "f32"), 0, np.array([5]))], np.array([0]))
        executable.release()
    assert len(os.listdir("/proc/self/fd")) == before
