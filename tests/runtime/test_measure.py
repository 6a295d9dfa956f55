"""`smoe bench`: its numbers against the same ones made by hand from the engine's logits."""

import json
import subprocess
import sys

import numpy as np
import pytest

from smoe.artifacts import open_bundle
from smoe.runtime import Engine, EngineError, Policies
from smoe.runtime.budget import memory_for, plan_memory
from smoe.runtime.evaluate import (
    OPTIONS,
    Exact,
    bench,
    choose,
    exact,
    graded,
    items,
    measure,
    read_documents,
    rows,
)
from smoe.runtime.machine import held_memory
from smoe.runtime.sizes import MIB

DOCUMENTS = [("code", f"def main_{n}(argument): return argument + {n} " * 9) for n in range(4)] + [
    ("prose", "Grüße")
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text(
        "\n".join(json.dumps({"domain": domain, "text": text}) for domain, text in DOCUMENTS)
    )
    return file


@pytest.fixture
def small(golden):
    """Opens the golden bundle with room for 5 of 14 experts; as `bench` wants it, so that policies
    can be taken out."""
    budget = memory_for(open_bundle(golden), 5, 200)
    lossy = {"substitution": "zero:1"}
    return lambda **changed: Engine.open(
        golden,
        beside=budget,
        context=200,
        policies=Policies(substitution={**lossy, **changed}["substitution"] or "none"),
    )


def _log_softmax(logits):
    return logits.astype(np.float64) - np.log(
        np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    )


def test_rows_take_turns_and_stop_at_the_count(golden):
    with Engine.open(golden) as engine:
        encoded = [engine.text.encode(text) for _, text in DOCUMENTS]
        found = rows(engine, DOCUMENTS, tokens=120, length=50)
        assert [row.tolist() for row in found[:2]] == [encoded[0][:50], encoded[1][:50]]
        assert sum(map(len, found)) == 120
        every = rows(engine, DOCUMENTS, tokens=10**6, length=50)
        assert every[len(DOCUMENTS)].tolist() == encoded[0][50:100]
        with pytest.raises(EngineError, match="no row of 2 tokens"):
            rows(engine, [("", "")], 100, 50)


def test_quality_is_what_the_logits_say(small, golden, tmp_path):
    with Engine.open(golden) as engine:
        texts = rows(engine, DOCUMENTS, 140, 50)
        p = [_log_softmax(engine.logits(row)) for row in texts]
        kept = exact(engine, texts, 8, tmp_path / "exact")
        found = np.stack([kept[at] for at in range(sum(len(row) - 7 for row in texts))])
        assert np.allclose(found, np.concatenate([of[7:] for of in p]), atol=1e-4)
    with small() as engine:
        q = [np.stack(list(engine.score(row, 8))) for row in texts]
    with small() as engine:  # a fresh one, since what is resident changes what is left out
        found = measure(engine, texts, 8, kept)
    q = [_log_softmax(of) for of in q]
    p = [of[7:] for of in p]
    kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
    nats = np.concatenate(
        [-b[np.arange(len(row) - 8), row[8:]] for b, row in zip(q, texts, strict=True)]
    )
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-3) and found["kl"] > 0.001
    assert found["kl_error"] == pytest.approx(kl.std() / len(kl) ** 0.5, rel=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(p, q, strict=True)])
    assert found["top1"] == pytest.approx(same.mean()) and 0 < found["top1"] < 1
    assert found["tokens"] == 140


def test_the_exact_run_is_not_held_while_the_lossy_one_is_compared_with_it(tmp_path):
    (tmp_path / "exact").write_bytes(bytes(64 << 20))
    kept, before = Exact(tmp_path / "exact", 1 << 16), held_memory()
    assert not any(kept[position].any() for position in range(256))
    assert before is None or held_memory() - before < 8 << 20


def test_the_choice_task_prefers_what_is_likelier(golden):
    with Engine.open(golden) as engine:
        questions = items(engine, DOCUMENTS, 6, context=20, option=5)
        assert len(questions) == 6 and all(len(item.options) == OPTIONS for item in questions)
        answers = choose(engine, questions)
        for item, answer in zip(questions, answers, strict=True):
            likelihoods = []
            for option in item.options:
                log_p = _log_softmax(engine.logits(np.concatenate([item.context, option])))
                likelihoods.append(log_p[np.arange(19, 24), option].sum())
            assert answer == np.argmax(likelihoods)
        joined = [
            "".join(chr(token) for token in engine.text.encode(text)) for _, text in DOCUMENTS
        ]
        for item in questions:
            true = "".join(map(chr, np.concatenate([item.context, item.options[0]])))
            assert sum(true in text for text in joined) == 1, "the first option follows its context"
        with pytest.raises(EngineError, match="4 documents of 205 tokens in one domain"):
            items(engine, DOCUMENTS, 1, context=200, option=5)


def test_answers_are_graded_alone_and_beside_the_exact_run():
    answers, exact_answers = np.array([0, 1, 0, 3]), np.array([0, 0, 0, 3])
    assert graded(answers) == {"choice_accuracy": 0.5}
    assert graded(answers, exact_answers) == {
        "choice_accuracy": 0.5,
        "choice_accuracy_exact": 0.75,
        "choice_same": 0.75,
    }


def test_a_lossy_run_is_compared_with_its_exact_twin(small, text):
    said = []
    found = bench(
        small,
        lambda: small(substitution=None),
        text,
        100,
        50,
        8,
        8,
        lambda *lines: said.extend(lines),
    )
    assert found["kl"] > 0.001 and 0 < found["substituted_share"] < 1
    assert {"choice_accuracy", "choice_accuracy_exact", "choice_same", "peak_memory"} <= set(found)
    assert any("lossy" in line for line in said)
    with small(substitution=None) as engine:
        assert engine.lossless
    lossless = bench(lambda: small(substitution=None), small, text, 100, 50, 8, 8)
    assert "kl" not in lossless and "choice_same" not in lossless
    assert lossless["choice_accuracy"] == found["choice_accuracy_exact"]


def test_the_command_prints_it_for_people_and_as_json(golden, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "smoe.runtime",
        "bench",
        golden,
        "--text",
        text,
        "--tokens",
        "60",
        "--choices",
        "2",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokens per second" in shown.stdout and "choice accuracy" in shown.stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert found["tokens"] == 60 and found["perplexity"] > 1
    (tmp_path / "bad.jsonl").write_text('{"txt": "x"}\n')
    with pytest.raises(EngineError, match="bad.jsonl, line 1"):
        read_documents(tmp_path / "bad.jsonl")
    for text in ('{"text": 5}', '{"text": null}', "5", "[" * 100_000):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "good"}}\n{text}\n')
        with pytest.raises(EngineError, match="bad.jsonl, line 2"):
            read_documents(tmp_path / "bad.jsonl")


def _smoe(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smoe.runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _smoe_bench(*arguments: object) -> subprocess.CompletedProcess:
    return _smoe("bench", *arguments)


def test_fewer_planes_are_compared_with_all_of_them_where_only_the_fewer_fit(goldens, text):
    """What is said to be the least has something in it for processes that are larger."""
    least = plan_memory(open_bundle(goldens[2]), None, 200, level=1).minimum
    with pytest.raises(EngineError, match="too small"):
        Engine.open(goldens[2], beside=least, context=200)
    done = _smoe("info", goldens[2], "--context", 200, "--json")
    least = json.loads(done.stdout)["memory_minimum"] - MIB
    options = ("--memory", least, "--context", 200, "--level", 1, "--tokens", 40, "--json")
    done = _smoe_bench(goldens[2], "--text", text, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kl"] > 0 and "exact run for comparison: needs" in done.stderr


def test_a_narrower_state_is_compared_with_the_bundle_s_own(goldens, text):
    own = open_bundle(goldens[5]).manifest.backbone.state_kind or "f16"
    for state, loses in (("int8", own != "int8"), ("f32", False)):
        options = ("--state", state, "--tokens", 40, "--json")
        done = _smoe_bench(goldens[5], "--text", text, *options)
        assert done.returncode == 0, done.stderr
        assert (json.loads(done.stdout).get("kl", 0) > 0) == loses
        assert ("LOSSY: narrower" in done.stderr) == loses


@pytest.mark.parametrize("option", [
    ("--memory", "1KiB"), ("--eviction", "nonsense"), ("--level", "77"), ("--loss", "5"),
    ("--shares",),
    ("--choices", "9"), ("--length", "256"), ("--context", "64"),
])  # fmt: skip
def test_options_without_effect_on_the_measuring_of_a_machine_are_named(golden, tmp_path, option):
    done = _smoe_bench(golden, "--machine", tmp_path / "m.json", *option)
    assert done.returncode == 2 and f"{option[0]} has no effect with --machine" in done.stderr
    assert not (tmp_path / "m.json").exists()
