"""Programs: the native executor against its NumPy twin, bit for bit, on every instruction set there
is; and that a token's bits depend on its own past alone."""

import numpy as np
import pytest
from support.programs import Layers, same

from smoe.artifacts import record_layout
from smoe.artifacts.encodings import encode_expert
from smoe.artifacts.layout import ExpertShape
from smoe.artifacts.manifest import ExpertActivation
from smoe.runtime import EngineError, kernels
from smoe.runtime.program import LayerExperts, ProgramState, flatten
from smoe.runtime.program.layout import StateLayout
from smoe.runtime.program.plan import plan
from smoe.runtime.routing import Assignment, Available, Dispatch, combine

VARIANTS = kernels.available()
NATIVE = VARIANTS[:-1]


# -- a token's bits depend on its own past ---------------------------------------------------


def whole(executable, model: Layers, ids: np.ndarray, kind: str = "f32") -> np.ndarray:
    """Logits of every token, in one step."""
    spans = [(executable.state(len(ids), kind), 0, ids)]
    return model.logits(executable, spans, np.arange(len(ids)))


def tokens(model: Layers, count: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.VOCABULARY, count)


@pytest.mark.parametrize("form", ["f32", "int8", "int4", "bf16"])
@pytest.mark.parametrize("kind", ["f32", "f16", "int8"])
def test_every_variant_gives_the_bits_of_the_twin(tmp_path, form, kind):
    some = kind != "f32"
    model = Layers(form, window=4 * some, softcap=1.5 * some, sinks=some, latent=kind == "int8")
    ids = tokens(model, 11)
    *native, reference = (
        whole(model.open(tmp_path, name, wires=model.wires), model, ids, kind) for name in VARIANTS
    )
    assert np.isfinite(reference).all() and reference.std() > 0.1
    for logits in native:
        assert same(logits, reference)


@pytest.mark.parametrize("form", ["f32", "int8"])
@pytest.mark.parametrize("window", [0, 150])
def test_prompts_may_be_cut_anywhere(tmp_path, form, window):
    model = Layers(form, window=window)
    ids = tokens(model, 300)
    for name in NATIVE:
        executable = model.open(tmp_path, name, wires=model.wires)
        truth = whole(executable, model, ids)
        for seed in range(2):
            cuts = np.random.default_rng(seed).choice(np.arange(1, 300), 4, replace=False)
            state, past, parts = executable.state(300, "f32"), 0, []
            for part in np.split(ids, np.sort(cuts)):
                keep = np.arange(len(part))
                parts.append(model.logits(executable, [(state, past, part)], keep))
                past += len(part)
            assert same(np.concatenate(parts), truth)


def test_one_token_at_a_time_gives_the_same(tmp_path):
    model = Layers("int8")
    ids = tokens(model, 140)
    executable = model.open(tmp_path, NATIVE[0], wires=model.wires)
    state = executable.state(150, "f32")
    one = [
        model.logits(executable, [(state, past, ids[past : past + 1])], np.arange(1))
        for past in range(len(ids))
    ]
    assert same(np.concatenate(one), whole(executable, model, ids))


def test_sequences_and_threads_do_not_matter(tmp_path):
    model = Layers("int8")
    prompts = [tokens(model, 1 + 7 * i, i) for i in range(16)]
    alone = model.open(tmp_path, NATIVE[0], wires=model.wires)
    truth = [whole(alone, model, ids)[-1] for ids in prompts]
    ends = np.cumsum([len(ids) for ids in prompts]) - 1
    for threads in (1, 2, 3, 4):
        executable = model.open(tmp_path, NATIVE[0], threads, model.wires)
        spans = [(executable.state(len(ids), "f32"), 0, ids) for ids in prompts]
        assert same(model.logits(executable, spans, ends), np.stack(truth))


def test_no_logits_or_some_of_them(tmp_path):
    model = Layers()
    ids = tokens(model, 135)
    for name in VARIANTS:
        executable = model.open(tmp_path, name, wires=model.wires)
        truth = whole(executable, model, ids)
        for keep in ([], [130], [0, 1, 127, 128, 134]):
            spans = [(executable.state(135, "f32"), 0, ids)]
            logits = model.logits(executable, spans, np.array(keep, np.int64))
            assert same(logits, truth[keep])


def test_a_segment_may_be_run_again_with_another_value(tmp_path):
    model = Layers()
    ids = tokens(model, 9)
    for name in VARIANTS:
        executable = model.open(tmp_path, name, wires=model.wires)
        rows = executable.begin([(executable.state(9, "f32"), 0, ids)], np.array([8]))
        executable.run(rows, 0)
        executable.run(rows, 1)
        hidden = executable.read(rows, "hidden 0").copy()
        executable.write(rows, "output 0", np.ones_like(hidden))
        executable.run(rows, 2)  # a guess
        guess = executable.read(rows, "hidden 1").copy()
        assert same(executable.read(rows, "hidden 0"), hidden)
        executable.write(rows, "output 0", hidden)
        executable.run(rows, 2)
        true = executable.read(rows, "hidden 1").copy()
        assert not same(guess, true)
        executable.write(rows, "output 0", np.ones_like(hidden))
        executable.run(rows, 2)
        assert same(executable.read(rows, "hidden 1"), guess)


def test_states_are_forked_and_rewound(tmp_path):
    model = Layers()
    ids = tokens(model, 30)
    executable = model.open(tmp_path, NATIVE[0], wires=model.wires)
    state = executable.state(40, "f16")
    model.logits(executable, [(state, 0, ids)], np.array([29]))
    fork = state.fork(20)
    again = model.logits(executable, [(fork, 20, ids[20:])], np.array([9]))
    rewound = model.logits(executable, [(state, 20, ids[20:])], np.array([9]))
    assert same(again, rewound) and fork.nbytes == state.nbytes
    shorter = model.logits(executable, [(state.fork(5), 5, ids[5:7])], np.array([1]))
    assert same(shorter, whole(executable, model, ids[:7], "f16")[-1:])


# -- from layer to layer without returning ----------------------------------------------------


def experts_of(model: Layers, encoding: str):
    """Kernels and records of one set of experts, the same for all layers."""
    spec, shape = ExpertActivation("gated", "silu"), ExpertShape(model.HIDDEN, 40)
    layout = record_layout(shape, encoding, 4096)
    random = np.random.default_rng(3)

    def record() -> np.ndarray:
        weights = {
            name: random.standard_normal(dims).astype(np.float32)
            for name, dims in shape.matrices().items()
        }
        return encode_expert(layout, encoding, weights)

    records = np.stack([record() for _ in range(model.EXPERTS)])
    return (lambda kernels: kernels.layer(spec, shape, encoding, layout)), records


@pytest.mark.parametrize("tokens_of", [1, 5])
def test_steps_stop_where_an_expert_is_missing(tmp_path, tokens_of):
    model = Layers("int8", layers=3)
    layer, records = experts_of(model, "nested:2+1+1:32")
    ids = tokens(model, tokens_of)
    for name in NATIVE:
        kernel = layer(kernels.choose(name, 1))
        executable = model.open(tmp_path, name, wires=model.wires)
        where = [np.arange(model.EXPERTS)[::-1].copy() for _ in range(model.layers)]
        mixture = executable.mixture(layers_of(model, kernel, where), records)

        rows = started(executable, ids)
        for index in range(model.layers):
            mix(executable, rows, index, kernel, records, where[index])
            executable.run(rows, index + 2)
        logits = executable.read(rows, "logits").copy()
        routed = [executable.read(rows, f"ids {i}").copy() for i in range(model.layers)]

        rows = started(executable, ids)
        assert executable.steps(rows, mixture, 0) == model.layers
        assert same(executable.read(rows, "logits"), logits)
        for index in range(model.layers):  # what was routed is still there
            assert same(executable.read(rows, f"ids {index}"), routed[index])

        gone = int(routed[1][0, 1])
        where[1][gone], frame = -1, where[1][gone]
        rows = started(executable, ids)
        assert executable.steps(rows, mixture, 0) == 1
        where[1][gone] = frame
        assert executable.steps(rows, mixture, 1) == model.layers
        assert same(executable.read(rows, "logits"), logits)


def started(executable, ids: np.ndarray):
    """A step up to the first layer's experts."""
    rows = executable.begin([(executable.state(9, "f32"), 0, ids)], np.array([0]))
    executable.run(rows, 0)
    executable.run(rows, 1)
    return rows


def layers_of(model: Layers, kernel, where) -> list[LayerExperts]:
    return [
        LayerExperts(
            kernel, 3, where[i], i + 1, f"hidden {i}", f"ids {i}", f"weights {i}", f"output {i}"
        )
        for i in range(model.layers)
    ]


def mix(executable, rows, index: int, kernel, records, where) -> None:
    """A layer's experts as the runtime computes them."""
    hidden, ids, weights = (
        executable.read(rows, f"{name} {index}") for name in ("hidden", "ids", "weights")
    )
    available = Available(level=np.full(len(where), 3), full=3)
    dispatch = Dispatch.of(Assignment(ids, weights), available)
    outputs = np.zeros((*ids.shape, hidden.shape[1]), np.float32)
    work = kernels.Work(where[dispatch.experts], dispatch.levels, dispatch.starts, dispatch.tokens)
    outputs[dispatch.tokens, dispatch.ranks] = kernel(records, work, hidden.copy())
    executable.write(rows, f"output {index}", combine(outputs, weights))


# -- what is wrong is said -------------------------------------------------------------------


def test_bad_steps_are_refused(tmp_path):
    model = Layers()
    other = Layers(layers=1)
    for name in VARIANTS:
        executable = model.open(tmp_path, name, wires=model.wires)
        state = executable.state(5, "f32")
        for spans, keep, sentence in (
            ([(state, 0, np.array([1, 50]))], [0], "Token id 50 is not one of the program's 50"),
            ([(state, 0, np.array([-1]))], [0], "Token id -1"),
            ([(state, 4, np.array([1, 2]))], [0], "longer than its state of 5"),
            ([(state, 0, np.array([1, 2]))], [1, 1], "Rows to keep rise"),
            ([(state, 0, np.array([1, 2]))], [2], "rows of the step"),
            ([(state, 0, np.array([], np.int64))], [], "at least one token"),
        ):
            with pytest.raises(EngineError, match=sentence):
                executable.begin(spans, np.array(keep, np.int64))
    native = model.open(tmp_path, NATIVE[0], wires=model.wires)
    foreign = other.open(tmp_path, NATIVE[0], wires=other.wires).state(5, "f32")
    with pytest.raises(EngineError, match="another program"):
        native.begin([(foreign, 0, np.array([1]))], np.array([0]))


WILD = [0, 1, 2, 3, 17, 64, 2**31, 2**62]


def another(number, random: np.random.Generator):
    """Of the same type, mostly wrong."""
    if isinstance(number, bool):
        return not number
    if isinstance(number, float):
        return float(random.choice([0, -1, 0.5, 1e300, np.nan]))
    if isinstance(number, int):
        return int(random.choice(WILD)) if random.random() < 0.7 else number + 1
    words = ["f32", "i64", "bool", "int4", "product", "norm", "unary", "layer", "halves", "sum", ""]
    return str(random.choice(words))


def damaged(value, random: np.random.Generator):
    """Nested lists and tuples with one leaf that is another."""
    if not isinstance(value, list | tuple):
        return another(value, random)
    if not value:
        return value
    at = int(random.integers(len(value)))
    if random.random() < 0.02:
        return value[:at] + value[at + 1 :]
    return value[:at] + type(value)([damaged(value[at], random)]) + value[at + 1 :]


def test_damaged_tables_end_in_a_sentence_or_run(tmp_path):
    """What the door would refuse: the native module alone lets nothing look elsewhere."""
    model = Layers("int8")
    program = model.program
    weights = np.zeros(len(model.data) + 64, np.uint8)
    weights = weights[-weights.ctypes.data % 64 :][: len(model.data)]
    weights[:] = np.frombuffer(bytes(model.data), np.uint8)
    table = [
        flatten.buffers(program, plan(program, None)), flatten.constants(program),
        flatten.states(program), flatten.recurrent(program), flatten.segments(program),
    ]  # fmt: skip
    layout = StateLayout.of(program, "f32")
    ids, random, refused = tokens(model, 5), np.random.default_rng(0), 0
    sentences: list[str] = []
    for _ in range(3000):
        wrong = list(table)
        part = int(random.choice(5, p=[0.2, 0.1, 0.04, 0.01, 0.65]))
        wrong[part] = damaged(wrong[part], random)
        held = ProgramState(layout, 9, {})
        held.reserve(0, 8)
        about = (held.tables, held.layouts, held.context, held.recurrent_at)
        state = kernels.native_state(*about, [])
        try:
            program = kernels.native_program(weights, *wrong, NATIVE[0], 1)
            rows = program.begin([(state, 3, ids)], np.array([1, 4]))
            for segment in range(len(table[4])):
                program.run(rows, segment, 0, rows.tokens)
        except (MemoryError, TypeError):  # rows beyond all measure; a field that is not there
            refused += 1
        except ValueError as error:
            sentences.append(str(error))
    assert 1000 < refused + len(sentences) < 3000
    assert all(sentence.endswith(".") for sentence in sentences)
