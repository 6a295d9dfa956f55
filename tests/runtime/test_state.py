"""What programs remember of sequences: blocks that are taken, shared, dropped and come back, state
that is carried along, and that none of it changes a bit."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import sequences
from support.programs import Layers, same

from smoe.artifacts.program import KeyValues, Program, Recurrent
from smoe.runtime import EngineError, kernels
from smoe.runtime.kernels.blocks import TOKENS, BlockLayout
from smoe.runtime.program import ProgramState
from smoe.runtime.program.layout import KEPT, REWIND, StateLayout

WHOLE = BlockLayout("f16", 2, 20, 12)


def made(
    context: int, windows: tuple[int, ...] = (0, 0), recurrent=(), block: BlockLayout = WHOLE
) -> tuple[ProgramState, dict]:
    """A state, and its pools."""
    pools: dict = {}
    layout = StateLayout(block.kind, (block,) * len(windows), windows, recurrent)
    return ProgramState(layout, context, pools), pools


def used(pools: dict) -> int:
    """Blocks."""
    return sum(pool.used for pool in pools.values())


def write(state: ProgramState, past: int, values) -> None:
    """A step whose token i leaves `values[i]` everywhere."""
    state.reserve(past, past + len(values))
    for number, layout in enumerate(state.layouts):
        for i, value in enumerate(values, past):
            views = layout.views(state.block(number, i // TOKENS))
            for view in views.values():
                view[:, i % TOKENS] = value


def read(state: ProgramState, number: int, first: int, end: int) -> list[float]:
    """What attention `number` sees of these tokens."""
    layout = state.layouts[number]
    return [
        float(layout.views(state.block(number, i // TOKENS))["keys"][0, i % TOKENS, 0])
        for i in range(first, end)
    ]


# -- memory ------------------------------------------------------------------------------------


def test_a_sequence_pays_for_the_tokens_that_it_has():
    state, pools = made(context=100_000)
    assert state.nbytes == used(pools) == 0
    state.reserve(0, 33)
    assert used(pools) == 2 * 2 and state.nbytes == 4 * WHOLE.nbytes
    for past in range(33, 64):
        state.reserve(past, past + 1)
    assert used(pools) == 2 * 2
    state.reserve(64, 65)
    assert used(pools) == 2 * 3


def test_a_fork_takes_no_memory_until_it_is_written_to():
    state, pools = made(context=2000)
    write(state, 0, [1.0] * 1000)
    before = used(pools)
    fork = state.fork(1000)
    assert used(pools) == before
    write(fork, 1000, [2.0])
    assert used(pools) == before + 2  # one for each attention
    write(state, 1000, [3.0])
    assert used(pools) == before + 2
    assert read(fork, 1, 998, 1001) == [1, 1, 2] and read(state, 1, 998, 1001) == [1, 1, 3]
    del fork
    gc.collect()
    assert used(pools) == before


def test_what_a_fork_of_fewer_tokens_writes_is_its_own():
    state, _ = made(context=200)
    write(state, 0, np.arange(90))
    fork = state.fork(40)
    write(fork, 40, [-1.0] * 3)
    assert read(state, 0, 0, 90) == list(range(90))
    assert read(fork, 0, 38, 43) == [38, 39, -1, -1, -1]
    with pytest.raises(EngineError, match="does not remember the first 44 tokens"):
        fork.fork(44)


def test_blocks_of_a_sequence_that_is_gone_serve_the_next():
    state, pools = made(context=300)
    state.reserve(0, 300)
    addresses = {int(a) for a in state.tables.flat}
    other = ProgramState(StateLayout("f16", (WHOLE,) * 2, (0, 0), ()), 300, pools)
    del state
    other.reserve(0, 300)
    assert {int(a) for a in other.tables.flat} == addresses
    other.rewind(10)
    assert used(pools) == 2


def test_memory_that_there_is_not_is_a_sentence():
    block = BlockLayout("f32", 1 << 20, 1 << 20, 1 << 20)
    state, _ = made(100, (0,), block=block)
    with pytest.raises(EngineError, match="no memory for what a sequence of 3 tokens remembers"):
        state.reserve(0, 3)
    assert state.rewind(0) == 0


@pytest.mark.parametrize("window", [1, 31, 32, 33, 100, 700])
def test_a_window_bounds_what_is_held_at_any_time(window):
    """Prompts of many lengths that may be thrown away, and tokens one by one."""
    state, pools = made(4000, (window,))
    most = StateLayout.of(_program(window), "f16").blocks(0, 4000)
    random, past = np.random.default_rng(window), 0
    while past < 3900:
        taken = state.snapshot(past)
        for _ in range(random.integers(1, 4)):
            count = int(min(random.choice([1, 30, 130, 1000]), 4000 - past))
            state.reserve(past, past + count)
            past += count
            assert used(pools) <= most
        del taken
        for _ in range(min(70, 4000 - past)):
            state.reserve(past, past + 1)
            past += 1
            assert used(pools) <= most
    assert most < 4000 // TOKENS


def _program(window: int) -> Program:
    return Layers(layers=1, window=window).program


def test_a_layout_says_how_much_that_is():
    program = Layers(layers=3, window=(0, 40, 0)).program
    layout = StateLayout.of(program, "int8")
    assert layout.windows == (0, 40, 0)
    block = layout.attentions[0].nbytes
    assert layout.nbytes(10_000) == (2 * 313 + layout.blocks(1, 10_000)) * block
    assert layout.nbytes(64) == 3 * 2 * block
    carried = Program((), (), (KeyValues("k", "v", 0, 1, 4, 4),), (), (Recurrent("s", 0, (3, 5)),))
    assert StateLayout.of(carried, "f32").nbytes(0) == 15 * 4 * (KEPT + 2)


# -- going back ----------------------------------------------------------------------------------


def test_a_window_can_be_rewound_by_some_tokens_and_else_to_nothing():
    state, _ = made(3000, (0, 50))
    write(state, 0, np.arange(2000) % 1000)
    assert state.fork(2000).rewind(1000) == 0
    for length in (1999, 1900, 2000 - REWIND):
        assert state.rewind(length) == length
        assert read(state, 1, length - 49, length) == [i % 1000 for i in range(length - 49, length)]
    with pytest.raises(EngineError, match="does not remember the first 1000 tokens"):
        state.reserve(1000, 1001)


@pytest.mark.parametrize("tokens", [1, 100, 1500])
def test_a_step_that_is_given_up_leaves_nothing(tokens):
    state, _ = made(3000, (0, 50))
    write(state, 0, np.arange(700))
    write(state, 700, [-1.0] * tokens)
    write(state, 700, [-2.0] * 3)
    assert read(state, 0, 0, 703) == [*range(700), -2, -2, -2]
    assert read(state, 1, 653, 703) == [*range(653, 700), -2, -2, -2]


def test_a_snapshot_brings_back_what_windows_dropped():
    state, pools = made(5000, (0, 50))
    write(state, 0, np.arange(700))
    taken, before = state.snapshot(700), used(pools)
    for past in (700, 1900, 3100):
        write(state, past, [-1.0] * 1200)
    state.restore(taken)
    assert read(state, 0, 0, 700) == list(range(700))
    assert read(state, 1, 651, 700) == list(range(651, 700))
    write(state, 700, [7.0])
    del taken
    assert used(pools) <= before


class Sums:
    """Recurrent state whose numbers depend on all tokens: x = x / 2 + token."""

    def __init__(self):
        self.state, _ = made(10_000, (), recurrent=((3,), (2, 2)))
        self.ids: list[float] = []

    def step(self, new: list[float], counts: bool = True) -> None:
        self.state.reserve(len(self.ids), len(self.ids) + len(new))
        for _ in range(2):  # a segment may run again
            for before, after in zip(self.state.before, self.state.recurrent, strict=True):
                np.copyto(after, before)
                for token in new:
                    after[...] = after / 2 + token
        self.ids += new if counts else []

    def right(self) -> bool:
        total = np.float32(0)
        for token in self.ids:
            total = total / np.float32(2) + np.float32(token)
        self.state.reserve(len(self.ids), len(self.ids) + 1)
        return all((array == total).all() for array in self.state.before)

    def rewind(self, length: int) -> int:
        reached = self.state.rewind(length)
        del self.ids[reached:]
        return reached


def test_recurrent_state_goes_back_to_where_prompts_ended():
    one = Sums()
    ends = []
    for count in (5, 3, 4, 2, 6, 7):
        one.step([float(i) for i in range(count)])
        ends.append(len(one.ids))
        for token in range(3):
            one.step([float(token)])
    assert one.right()
    for end in reversed(ends[-KEPT:]):
        assert one.rewind(end + 1) == end and one.right()
        assert one.rewind(end) == end and one.right()
    assert one.rewind(ends[-KEPT] - 1) == 0 and one.right()


def test_recurrent_state_at_random():
    random = np.random.default_rng(3)
    all_ = [Sums()]
    for _ in range(400):
        one = all_[random.integers(len(all_))]
        act = random.integers(6)
        new = random.integers(0, 9, random.choice([1, 4])).astype(float).tolist()
        if act < 2:
            one.step(new)
        elif act == 2:
            one.step(new, counts=False)
        elif act == 3:
            one.rewind(max(0, len(one.ids) - int(random.integers(0, 9))))
        elif act == 4:
            taken = one.state.snapshot(len(one.ids))
            length = len(one.ids)
            one.step(new)
            one.step(new)
            del one.ids[length:]
            one.state.restore(taken)
        else:
            other = Sums()
            other.state, other.ids = one.state.fork(len(one.ids)), list(one.ids)
            all_ = [*all_[-4:], other]
        most = one.state.nbytes
        assert most <= StateLayout("f32", (), (), ((3,), (2, 2))).nbytes(0)
        assert all(each.right() for each in all_)


# -- files ---------------------------------------------------------------------------------------


def test_what_a_file_says_is_checked():
    state, _ = made(500, (0, 40), ((4,),))
    state.reserve(0, 333)
    arrays = {name: array.copy() for name, array in state.arrays(333)}
    kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    other, _ = made(500, (0, 40), ((4,),))
    other.check(kinds, 333)
    for name, kind in (
        ("0.keys", (np.dtype(np.float32), (2, 333, 20))),
        ("0.keys", (np.dtype(np.float16), (2, 332, 20))),
        ("1.values", (np.dtype(np.float16), (2, 5, 12))),
        ("2.values", (np.dtype(np.float16), (2, 333, 12))),
        ("recurrent.0.value", (np.dtype(np.float32), (5,))),
    ):
        with pytest.raises(EngineError, match="is not one of a state of 333 tokens in f16"):
            other.check(kinds | {name: kind}, 333)
    for name in kinds:
        with pytest.raises(EngineError, match=f"The array {name!r} is not one"):
            other.check({n: kind for n, kind in kinds.items() if n != name}, 333)


def test_codes_that_there_are_not_are_refused():
    state, _ = made(50, (0,), block=BlockLayout("int8", 1, 4, 4))
    state.reserve(0, 5)
    arrays = dict(state.arrays(5))
    arrays["0.values"][0, 2, 1] = -128
    other, _ = made(50, (0,), block=BlockLayout("int8", 1, 4, 4))
    with pytest.raises(EngineError, match="'0.values' of a state has codes below -127"):
        other.load(arrays, 5)
    assert other.nbytes == 0


# -- all of it ------------------------------------------------------------------------------------


def test_forks_rewinds_and_joins_change_no_bit():
    done, wrong = sequences.many(count=100, seed=0)
    assert not wrong
    assert done["step"] > 20 and done["fork"] > 5 and done["rewind"] > 10


def test_threads_with_sequences_of_their_own_share_memory(tmp_path):
    model = Layers("int8", window=(0, 40))
    executable = model.open(tmp_path, kernels.available()[0], wires=model.wires)

    def run(seed: int) -> list[np.ndarray]:
        random, state, length, said = np.random.default_rng(seed), None, 0, []
        for _ in range(60):
            if state is None or length > 300:
                state, length = executable.state(400, "f16"), 0
            new = random.integers(0, model.VOCABULARY, random.integers(1, 60))
            span = (state.fork(length), length, new)
            said.append(model.logits(executable, [span], np.array([len(new) - 1])))
            state, length = span[0], length + len(new)
            length = state.rewind(length - int(random.integers(0, min(length, 5))))
        return said

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
