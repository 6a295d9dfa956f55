"""`smoe` as a user meets it: a real process each time."""

import json
import os
import subprocess
import sys

import pytest

from smoe.artifacts.errors import first_line, printable
from smoe.runtime import Engine


def smoe(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "smoe.runtime", *map(str, arguments)],
        input=stdin,
        text=True,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_run_prints_text_on_stdout_and_the_rest_on_stderr(golden, answer):
    ids = " ".join(map(str, answer["prompt"].tolist()))
    done = smoe("run", golden, ids, "--ids", "--max-new-tokens", 24)
    assert done.returncode == 0
    assert [int(i) for i in done.stdout.split()] == answer["greedy"].tolist()
    assert "memory:" in done.stderr and "kernels:" in done.stderr and "hits" in done.stderr


def test_run_as_json_and_from_stdin(golden):
    done = smoe(
        "run",
        golden,
        "-",
        "--json",
        "--max-new-tokens",
        5,
        "--memory",
        "240MiB",
        "--context",
        64,
        stdin="def main",
    )
    said = json.loads(done.stdout)
    assert len(said["ids"]) == said["stats"]["new_tokens"] == 5
    assert said["memory"]["budget"] == 240 << 20 and said["memory"]["total"] <= 240 << 20
    assert said["memory"]["process"] > 20 << 20
    assert (
        said["text"]
        == json.loads(smoe("run", golden, "def main", "--json", "--max-new-tokens", 5).stdout)[
            "text"
        ]
    )


def test_chat_answers_every_line_and_reuses_its_state(golden):
    done = smoe(
        "chat",
        golden,
        "--json",
        "--max-new-tokens",
        4,
        "--system",
        "be brief",
        stdin="hello\nagain\n\n",
    )
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(turns) == 2 and done.returncode == 0
    # The second turn runs its own words only, not the first again: fewer tokens than the whole
    # conversation has.
    first, both = (turn["stats"]["prompt_tokens"] for turn in turns)
    assert 0 < both - first < first + 30


def test_chat_gives_the_template_its_variables(golden, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ persona }}{% for t in tools %}{{ t.name }}{% endfor %}{{ messages[-1].content }}"
    )
    given = {"persona": "a pirate of many words", "tools": [{"name": "look"}]}
    options = ("--chat-template", template, "--max-new-tokens", 2, "--json")
    done = smoe(
        "chat", golden, *options, "--chat-template-kwargs", json.dumps(given), stdin="hello\n"
    )
    with Engine.open(golden, beside="1GiB") as engine:
        ids = engine.text.encode("a pirate of many wordslookhello", special=False)
    assert json.loads(done.stdout)["stats"]["prompt_tokens"] == len(ids)
    for wrong, said in (
        ("{", "is not JSON"),
        ("[1]", "is a JSON object"),
        ('{"messages": 1}', "is"),
    ):
        done = smoe("chat", golden, "--chat-template-kwargs", wrong, stdin="hello\n")
        assert done.returncode == 2 and f"--chat-template-kwargs {said}" in done.stderr


def test_an_answer_may_take_what_the_context_leaves(golden):
    done = smoe("chat", golden, "--context", 100, "--json", stdin="hello\n")
    stats = json.loads(done.stdout)["stats"]
    assert stats["finish"] == "end" or stats["prompt_tokens"] + stats["new_tokens"] == 100


def test_chat_goes_on_when_the_context_is_full(golden):
    said = "a rather long sentence " * 8
    done = smoe(
        "chat",
        golden,
        "--json",
        "--max-new-tokens",
        4,
        "--context",
        120,
        stdin=f"hi\n{said}\nho\n\n",
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "more than the context of 120" in done.stderr and "Traceback" not in done.stderr


LONG = "\n".join(f"turn number {number}" for number in range(12)) + "\n\n"
SHORT_CONTEXT = ("--json", "--max-new-tokens", 4, "--context", 150, "--system", "be brief")


def test_a_conversation_longer_than_the_context_goes_on_without_its_oldest_turns(golden):
    done = smoe("chat", golden, *SHORT_CONTEXT, stdin=LONG)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 12
    assert "longer than the context of 150 tokens: its oldest turn is dropped" in done.stderr
    assert "--context 300 has room for more (this model takes up to 300)" in done.stderr


def test_a_conversation_longer_than_the_context_ends_where_that_was_asked_for(golden):
    done = smoe("chat", golden, *SHORT_CONTEXT, "--overflow", "end", stdin=LONG)
    assert done.returncode == 0 and 0 < len(done.stdout.splitlines()) < 12
    assert "ends here; --overflow drop goes on" in done.stderr


CONTROL = "\x1b]0;owned\x07"


def _with_model_type(bundle, name):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["model_type"] = name
    for layer in manifest["layers"]:
        layer["routing"], layer["routing_refusal"] = None, f"refused {name}"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("arguments", [
    ("run", "{0}", "x", "--max-new-tokens", "1"),
    ("chat", "{0}", "--max-new-tokens", "1"),
    ("bench", "{0}", "--text", "{0}/tokenizer_config.json", "--tokens", "8"),
    ("info", "{0}"),
])  # fmt: skip
def test_no_command_lets_a_bundle_speak_to_the_terminal(copied, arguments):
    bundle = _with_model_type(copied, CONTROL)
    done = smoe(*(a.format(bundle) for a in arguments), stdin="hi\n\n")
    assert "owned" in done.stdout + done.stderr
    assert not {"\x1b", "\x07"} & set(done.stdout + done.stderr)


def test_no_sentence_about_a_bundle_speaks_to_the_terminal(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][CONTROL] = manifest["files"]["tokenizer.json"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    done = smoe("run", copied, "x")
    assert done.returncode == 1 and "owned" in done.stderr
    assert not {"\x1b", "\x07"} & set(done.stdout + done.stderr)


def test_what_is_printed_keeps_lines_and_joined_emoji():
    assert printable("a\tb\n👩‍👩‍👧 ü") == "a\tb\n👩‍👩‍👧 ü"
    assert printable("\r\x1b[2J\x9b\x00\ud800") == "\ufffd\ufffd[2J\ufffd\ufffd\ufffd"


def test_an_exception_without_text_is_called_by_its_name():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\n first \n second")) == "first"


def test_info_and_verify(golden, copied):
    assert "memory minimum" in smoe("info", golden).stdout
    said = json.loads(smoe("info", golden, "--json").stdout)
    assert (
        said["experts"] == 14
        and said["experts_per_token"] == 6
        and said["substitution"] == "possible"
    )
    assert json.loads(smoe("verify", golden, "--json").stdout)["ok"] is True
    with open(copied / "backbone" / "weights.data", "r+b") as file:
        file.write(b"\1")
    done = smoe("verify", copied)
    assert done.returncode == 1 and "weights.data has SHA-256" in done.stderr


@pytest.mark.parametrize("arguments, said", [
    (("run", "/no/such/bundle", "x"), "/no/such/bundle does not exist"),
    (("run", "{root}", "x"), "has no manifest.json"),
    (("run", "{golden}", ""), "prompt is empty"),
    (("run", "{golden}", "x", "--memory", "1MiB"), "needs at least"),
    (("run", "{golden}", "x", "--memory", "much"), "'much' is not a size"),
    (("run", "{golden}", "x", "--context", "9999"), "this model takes 1 to 300"),
    (("run", "{golden}", "x", "--max-new-tokens", "400"), "more than the context of 300"),
    (("run", "{golden}", "x", "--top-k", "3"), "no effect at temperature 0"),
    (("run", "{golden}", "one two", "--ids"), "--ids wants token ids"),
    (("info", "{golden}", "--context", "0"), "context"),
])  # fmt: skip
def test_mistakes_are_one_sentence_without_a_traceback(golden, root, arguments, said):
    done = smoe(*(str(a).format(golden=golden, root=root) for a in arguments))
    assert done.returncode != 0 and done.stdout == ""
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--max-new-tokens", "0")])
@pytest.mark.parametrize("command", [("run", "x"), ("chat",)])
def test_what_no_bundle_could_do_is_said_before_one_is_opened(tmp_path, command, option):
    done = smoe(command[0], tmp_path / "none", *command[1:], *option)
    assert done.returncode == 1 and f" is {option[1]}" in done.stderr
    assert "does not exist" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_chat_without_a_word_made_nothing(golden):
    done = smoe("chat", golden)
    assert done.returncode == 0 and "0 new (no decode);" in done.stderr


def test_a_chat_says_that_an_answer_was_cut(golden):
    done = smoe("chat", golden, "--max-new-tokens", 3, stdin="hello\n")
    assert "smoe: cut at 3 tokens; --max-new-tokens has room for more." in done.stderr


def test_an_unknown_kernel_is_refused(golden):
    done = smoe("run", golden, "x", SMOE_KERNELS="abacus")
    assert done.returncode == 1 and "no kernels 'abacus'" in done.stderr


def test_help_is_there(golden):
    for command in ("", "run", "chat", "info", "verify"):
        done = smoe(*command.split(), "-h")
        assert done.returncode == 0 and "Usage:" in done.stdout
