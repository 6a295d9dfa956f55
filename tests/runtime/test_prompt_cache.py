"""Beginnings of prompts that outlive a server."""

import os

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
from support.server import serving

from smoe.runtime import EngineError
from smoe.runtime.serve.prefixes import KEPT
from smoe.runtime.serve.prompt_cache import PromptCache

ASKED = {"prompt": [7 + i % 90 for i in range(100)], "max_tokens": 4, "temperature": 0}


def _cached(client, asked=ASKED):
    reply = client.ask("/v1/completions", asked).body
    (choice,) = reply["choices"]
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"], choice["text"]


def test_what_prompts_begin_with_outlives_a_server(goldens, tmp_path):
    cache = tmp_path / "cache"
    with serving(goldens[-1], cache=PromptCache(cache)) as client:
        shared, said = _cached(client)
        assert shared == 0
    assert "prompt cache: 1 beginnings in" in client.said[-1]
    assert cache.stat().st_mode & 0o077 == 0 and len(list(cache.iterdir())) == 1
    with serving(goldens[-1], cache=PromptCache(cache)) as client:
        assert _cached(client) == (99, said), "all but the last, and the same tokens"
    assert len(list(cache.iterdir())) == 1, "it was there already"
    with serving(goldens[-2], cache=PromptCache(cache)) as client:
        assert _cached(client)[0] == 0, "another bundle's is left alone"
    assert len(list(cache.iterdir())) == 2


def test_damaged_beginnings_and_a_lack_of_room_are_left_alone(goldens, tmp_path):
    for i in range(3):
        with serving(goldens[-1], cache=PromptCache(tmp_path)) as client:
            _cached(client, ASKED | {"prompt": [i + 9, *ASKED["prompt"]]})
    _, second, _ = files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    second.write_bytes(second.read_bytes()[:-7])
    with serving(goldens[-1], cache=PromptCache(tmp_path)) as client:
        assert _cached(client, ASKED | {"prompt": [9, *ASKED["prompt"]]})[0] == 100
        assert f"prompt cache: 2 beginnings of {tmp_path}" in client.said
    with serving(goldens[-1], context=110, requests=1, cache=PromptCache(tmp_path)) as client:
        _cached(client, ASKED | {"prompt": [5]})
        assert f"prompt cache: 1 beginnings of {tmp_path}" in client.said
    assert set(files) <= set(tmp_path.iterdir())


def test_only_the_last_used_stay_and_nobody_elses_file_goes(goldens, tmp_path):
    old = [tmp_path / f"{i:032x}.prompt" for i in range(KEPT)]
    for i, file in enumerate([*old, tmp_path / "mine.session"]):
        file.write_text("mine")
        os.utime(file, (i, i))
    with serving(goldens[-1], cache=PromptCache(tmp_path)) as client:
        _cached(client)
    (new,) = set(tmp_path.iterdir()) - {*old, tmp_path / "mine.session"}
    assert set(tmp_path.iterdir()) == {new, *old[1:], tmp_path / "mine.session"}


def test_a_directory_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "no" / "cache"):
        with pytest.raises(EngineError, match="cannot be made for a prompt cache"):
            PromptCache(directory)
