"""A backbone that its program runs whole: no ONNX Runtime, and a token's bits by its past alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import promise
from support.parts import CONTEXT, decoded, make_backbone, make_parts, prefilled, prompted, step

from bench import cgroup
from smoe.artifacts import open_bundle
from smoe.artifacts.program import PROGRAM_WEIGHTS
from smoe.runtime import Engine, EngineError, kernels
from smoe.runtime.budget import memory_for, plan_memory
from smoe.runtime.cli import cli
from smoe.runtime.execution import Execution, divide
from smoe.runtime.program import open_program
from smoe.runtime.step import Step

REASON = cgroup.unavailable()
IDS = np.random.default_rng(2).integers(0, 37, 200)


@pytest.fixture(scope="module")
def wanted(programmed) -> np.ndarray:
    """Logits of all of `IDS` at once, all experts resident."""
    with Engine.open(programmed, context=CONTEXT) as engine:
        return engine.logits(IDS)


def test_it_runs_without_onnxruntime(programmed):
    code = f"""
import sys
sys.modules["onnxruntime"] = None  # an import fails
from smoe.runtime.cli import cli
cli(["run", {str(programmed)!r}, "1 2 3", "--ids", "--max-new-tokens", "3"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
    assert "backbone: 4 of 4 segments in the program, int4, state f16" in done.stderr
    assert "any number of tokens" in done.stderr and "ONNX" not in done.stderr


def test_one_token_at_a_time_gives_the_bits_of_all_at_once(programmed, wanted):
    with Engine.open(programmed, context=CONTEXT) as engine:
        for prompt in (1, 7, 130):
            scored = np.stack(list(engine.score(IDS, prompt=prompt)))
            assert np.array_equal(scored, wanted[prompt - 1 :])


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_cut_anywhere_gives_the_same_bits(programmed, wanted, seed):
    random = np.random.default_rng(seed)
    cuts = np.sort(random.choice(np.arange(1, len(IDS)), 5, replace=False))
    with make_parts(programmed, experts=14) as parts:
        sequence = parts.sequence()
        found = [
            prefilled(parts.model, sequence, part, int(random.integers(1, 300)), len(part)).finish()
            for part in np.split(IDS, cuts)
        ]
    assert np.array_equal(np.concatenate(found), wanted)


def test_sequences_of_a_step_have_the_bits_that_they_have_alone(programmed):
    """Some decode, some read prompts, some are checked; each has its own past."""
    lengths = (1, 3, 40, 129, 2)
    with make_parts(programmed, experts=14) as parts:
        pasts = [parts.sequence() for _ in lengths]
        for number, sequence in enumerate(pasts):
            step(parts.model, prompted(sequence, IDS[: 5 * number + 1]))
        new = [IDS[-length:] for length in lengths]
        alone = [
            step(parts.model, prompted(sequence.fork(), ids, keep=1 if len(ids) > 2 else len(ids)))
            for sequence, ids in zip(pasts, new, strict=True)
        ]
        spans = [
            prompted(sequence, ids, keep=1 if len(ids) > 2 else len(ids))
            for sequence, ids in zip(pasts, new, strict=True)
        ]
        together = step(parts.model, *spans)
        for found, (logits,) in zip(together, alone, strict=True):
            assert np.array_equal(found, logits)
        after = [step(parts.model, decoded(sequence, 5))[0] for sequence in pasts]
        again = step(parts.model, *(decoded(sequence.fork(), 7) for sequence in pasts))
        assert len(after) == len(again)


def test_a_span_that_keeps_nothing_gives_no_logits(programmed):
    with make_parts(programmed, experts=14) as parts:
        one, other = parts.sequence(), parts.sequence()
        (wanted,) = step(parts.model, decoded(other.fork(), 3))
        first, second = step(parts.model, prompted(one, IDS[:9], keep=0), decoded(other, 3))
        assert first.shape == (0, 37) and np.array_equal(second, wanted)
        (nothing,) = step(parts.model, prompted(one, IDS[9:12], keep=0))
        assert nothing.shape == (0, 37) and one.ids == IDS[:12].tolist()


def test_logits_stay_when_the_next_step_has_run(programmed):
    with make_parts(programmed, experts=14) as parts:
        sequence = parts.sequence()
        (first,) = step(parts.model, prompted(sequence, IDS[:20], keep=4))
        kept = first.copy()
        step(parts.model, prompted(sequence, IDS[20:60], keep=4))
        assert np.array_equal(first, kept)


def test_a_sequence_that_is_rewound_or_forked_goes_on_as_if_it_had_never_gone_further(programmed):
    with make_parts(programmed, experts=14) as parts:
        sequence = parts.sequence()
        step(parts.model, prompted(sequence, IDS[:20]))
        fork = sequence.fork()
        wanted = [step(parts.model, decoded(fork, token))[0] for token in (4, 8)]
        step(parts.model, prompted(sequence, IDS[20:90]))
        sequence.rewind(20)
        assert sequence.length == 20
        found = [step(parts.model, decoded(sequence, token))[0] for token in (4, 8)]
        assert np.array_equal(found, wanted)


def test_a_turn_that_begins_as_the_last_one_did_reads_the_rest_alone(programmed):
    """Though one of the layers has a window of three tokens, and one carries state along."""
    turn = [*IDS[:150].tolist(), 5, 6]
    with Engine.open(programmed, context=CONTEXT) as engine:
        wanted = [token.id for token in engine.generate(turn, max_new_tokens=4)]
        for _ in engine.generate(turn[:150], max_new_tokens=9):
            pass
        before = engine.stats.prompt_tokens
        found = [token.id for token in engine.generate(turn, max_new_tokens=4, reuse=True)]
        assert found == wanted and engine.stats.prompt_tokens - before == 2


def test_a_guess_leaves_no_trace(programmed):
    """The next layer is tried on what is computed so far, and then runs on all of it."""
    with make_parts(programmed, experts=14) as parts:
        sequence, backbone = parts.sequence(), parts.backbone
        step(parts.model, prompted(sequence, IDS[:20]))
        mixed = np.random.default_rng(3).normal(0, 1, (2, 1, 40)).astype(np.float32)

        def run(guesses: bool) -> np.ndarray:
            flow = backbone.begin(Step((decoded(sequence.fork(), 4),)))
            for layer in (0, 1):
                said = backbone.route(layer, flow)
                if guesses and layer == 0:
                    guessed = backbone.peek(1, flow, 0.5 * mixed[0])
                    right = backbone.peek(1, flow, mixed[0])
                    assert not np.array_equal(guessed.hidden, said.hidden)
                    backbone.peek(1, flow, 2 * mixed[0])
                backbone.mix(layer, flow, mixed[layer])
                if guesses and layer == 1:
                    assert np.array_equal(said.ids, right.ids)
            (logits,) = backbone.finish(flow)
            return logits

        assert np.array_equal(run(guesses=True), run(guesses=False))


@pytest.mark.parametrize("experts", [9, 12, 14])
def test_going_on_from_layer_to_layer_below_python_changes_nothing(programmed, experts):
    """No bit, and nothing that is counted; where experts are missing, Python brings them."""
    seen = []
    for below in (True, False):
        passed = 0
        with make_parts(programmed, experts) as parts:
            advance = parts.model.advance

            def counted(layer, flow, held, advance=advance):
                nonlocal passed
                for ids in advance(layer, flow, held):
                    passed += 1
                    yield ids

            parts.model.advance = counted if below else None
            one, other = parts.sequence(), parts.sequence()
            logits = step(parts.model, prompted(one, IDS[:50], keep=50))
            logits += step(parts.model, prompted(other, IDS[50:55]))
            for token in range(20):
                logits += step(parts.model, decoded(one, token), decoded(other, token + 3))
            stats = parts.stats.as_dict()
        counts = {name: stats[name] for name in ("hits", "misses", "slots", "bytes_read")}
        seen.append((np.concatenate(logits), counts))
        assert (passed > 0) == below
    (first, counts), (second, same) = seen
    assert np.array_equal(first, second) and counts == same


@pytest.mark.parametrize("experts", [3, 6, 13])
def test_a_budget_changes_no_bit(programmed, wanted, experts):
    budget = memory_for(open_bundle(programmed), experts, CONTEXT)
    with Engine.open(programmed, beside=budget, context=CONTEXT) as engine:
        assert engine.plan.capacity == experts
        assert np.array_equal(engine.logits(IDS), wanted)
        assert np.array_equal(np.stack(list(engine.score(IDS[:30]))), wanted[:30])


@pytest.mark.parametrize("variant", kernels.available())
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_and_threads_change_no_bit(programmed, wanted, monkeypatch, variant, threads):
    monkeypatch.setenv("SMOE_KERNELS", variant)
    count = 40 if variant == "reference" else len(IDS)
    with Engine.open(programmed, context=CONTEXT, threads=threads) as engine:
        assert np.array_equal(engine.logits(IDS[:count]), wanted[:count])


def test_states_in_float32_are_closer_and_take_more_memory(programmed, wanted):
    with Engine.open(programmed, context=CONTEXT, state="f32") as engine:
        assert "state f32 (asked for)" in "\n".join(engine.mode_lines())
        found, state = engine.logits(IDS), engine.plan.state
    difference = np.abs(found - wanted).max() / np.abs(found).max()
    assert 0 < difference < 0.05
    with Engine.open(programmed, context=CONTEXT, state="f16") as engine:
        assert engine.plan.state < state < 2 * engine.plan.state
        assert np.array_equal(engine.logits(IDS), wanted)


def test_what_has_no_effect_is_refused(golden, programmed):
    with pytest.raises(EngineError, match="smoe-prep add BUNDLE --program"):
        Engine.open(golden, executor="program")
    with pytest.raises(EngineError, match="State f32 has no effect"):
        Engine.open(golden, state="f32")
    with pytest.raises(EngineError, match="There is no executor 'torch'"):
        Engine.open(programmed, executor="torch")
    with Engine.open(programmed, executor="program", context=20) as engine:
        assert engine.plan.backbone < 16 << 20


def test_commands_take_executor_and_state(golden, programmed):
    def run(bundle: Path, *options: str) -> Result:
        return CliRunner().invoke(
            cli, ["run", str(bundle), "1 2", "--ids", "--max-new-tokens", "2", *options]
        )

    done = run(programmed, "--executor", "program", "--state", "f32")
    assert done.exit_code == 0 and "state f32 (asked for)" in done.output
    done = run(programmed, "--state", "int8")
    assert done.exit_code == 0
    assert "state int8 (asked for, LOSSY: narrower than the bundle's f16)" in done.output
    for options in (("--executor", "program"), ("--state", "f16")):
        refused = run(golden, *options)
        assert refused.exit_code and isinstance(refused.exception, EngineError)


def test_onnxruntime_gets_what_it_is_asked_for(programmed):
    """Whose graphs are empty here."""
    with pytest.raises(EngineError, match=r"segment-00.onnx does not load in ONNX Runtime"):
        Engine.open(programmed, executor="onnx")


def test_weights_that_became_shorter_are_a_sentence(programmed, tmp_path):
    bundle = open_bundle(shutil.copytree(programmed, tmp_path / "short.smoe"))
    weights = bundle.path / PROGRAM_WEIGHTS
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(EngineError):
        make_backbone(bundle)
    weights.unlink()
    with pytest.raises(EngineError, match=r"program.data cannot be read"):
        make_backbone(bundle)


def test_the_plan_counts_weights_once_and_no_onnxruntime(programmed):
    bundle = open_bundle(programmed)
    plan = plan_memory(bundle, None, 256)
    assert not plan.onnxruntime
    assert plan.backbone - plan_memory(bundle, None, 1).backbone == 0
    onnx = plan_memory(bundle, None, 256, execution=Execution("onnx"))
    assert onnx.onnxruntime
    assert plan.total < onnx.total


def test_the_plan_counts_what_the_executable_takes(programmed):
    bundle = open_bundle(programmed)
    division = divide(bundle.manifest, bundle.program)
    chosen = kernels.choose()
    executable = open_program(programmed, bundle.program, chosen, chosen.threads, division.wires())
    assert executable.row_bytes == division.token_bytes(CONTEXT)
    logits = 3 * 4 * bundle.manifest.model.vocabulary
    assert executable.scratch_bytes + logits <= division.workspace(CONTEXT, 0)
    for kind in ("int8", "f16", "f32"):
        asked = divide(bundle.manifest, bundle.program, Execution(state=kind))
        state = executable.state(CONTEXT, kind)
        carried = state.nbytes  # nothing else before the first token
        state.reserve(0, CONTEXT)
        blocks = state.nbytes - 2 * carried  # before and after the step
        assert blocks == asked.state_bytes(CONTEXT) - asked.state_bytes(0)


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_stated_memory_is_kept_in_a_cgroup_of_just_that(programmed):
    info = [sys.executable, "-m", "smoe.runtime", "info", programmed, "--context", "300", "--json"]
    said = json.loads(subprocess.run(info, capture_output=True, check=True).stdout)
    told = promise.kept(Path(programmed), said["memory_minimum"], 300, 200)
    assert len({run["logits"] for run in told}) == 1


def test_it_says_what_transformers_says(compiled, answer):
    """And what ONNX Runtime says of the same bundle."""

    def relative(found: np.ndarray) -> float:
        return float(np.abs(found - answer["logits"]).max() / np.abs(answer["logits"]).max())

    for options, close in (
        ({"executor": "onnx"}, 1e-4),
        ({"executor": "program", "state": "f32"}, 1e-4),
        ({"executor": "program"}, 2e-3),
    ):
        with Engine.open(compiled, **options) as engine:
            assert engine.plan.onnxruntime == (options["executor"] == "onnx")
            assert relative(engine.logits(answer["prompt"])) < close
            tokens = [token.id for token in engine.generate(answer["prompt"], max_new_tokens=24)]
            assert tokens == answer["greedy"].tolist()
