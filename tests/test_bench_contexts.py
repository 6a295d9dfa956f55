"""The benches of prompts and long contexts: what is timed, and what their tables say."""

from bench import contexts, engines, harness
from bench.__main__ import main

MIB = 1 << 20


def test_the_prompt_is_timed_by_itself_and_what_follows_token_by_token(golden, answer):
    ids = answer["prompt"].ravel().tolist()
    request = engines.Request("smoe", str(golden), ids, warm=2, context=160, prompt=len(ids) - 9)
    done = engines.run(request)
    assert (done.warm, done.tokens) == (len(ids) - 8, 8)
    assert len(done.nats) == 9 and done.prompt > 0 and (done.bytes is None or done.bytes >= 0)


def test_long_contexts_are_compared_and_what_fails_is_a_row_that_says_why(
    golden, monkeypatch, tmp_path
):
    def child(function, **asked):
        if function == "contexts:llama":
            raise harness.ChildFailed("ended with 1", "unknown model architecture")
        rates = {"50": 100.0, "2000": 80.0, "8000": 60.0}
        about = {"first": 2.0, "opened": 0.5, "peak": 300 * MIB, "planned": 400 * MIB}
        return rates | about | {"prompt": 1024.0, "kind": "f16", "ran": ["backbone: ..."]}

    monkeypatch.setattr(contexts, "child", child)
    monkeypatch.setattr(contexts, "installed", lambda engine: True)
    paths = {"smoe": golden, "llama.cpp": golden}
    monkeypatch.setattr(contexts.models, "at_size", lambda *asked: paths)
    file = tmp_path / "contexts.json"
    asked = ["--directory", str(tmp_path), "--geometries", "olmoe", "--rounds", "2"]
    assert main(["contexts", *asked, "--json", str(file)]) == 0
    record = harness.read_record(file)
    ours, other = record.table("contexts").markdown().splitlines()[2:]
    rates, memory = "100.0 | 80.0 | 60.0 | 0.60 | 1024 | 2.00 | 0.50", "300 | 0.750 | f16"
    assert ours == f"| olmoe | smoe | {rates} | {memory} |  |  |"
    assert other.startswith("| olmoe | llama.cpp: unknown model architecture |  |  |  |")
    assert len(record.table("runs").rows) == 4
