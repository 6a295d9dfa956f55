"""Chat templates against `apply_chat_template`, character by character."""

from __future__ import annotations

import json

import pytest
import tokenizers
from support.conversations import CONVERSATIONS, GIVEN, SETTINGS, TEMPLATES
from transformers import AutoTokenizer

from smoe.runtime import chat
from smoe.runtime.errors import EngineError

# transformers' mark of where to go on; it cuts at the last, though a template may write several.
LEFT_BEHIND = "CONTINUE_FINAL_MESSAGE_TAG "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of a few words with `SETTINGS`, as `AutoTokenizer` opens it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<img>": 3, "a": 4}
    model = tokenizers.models.WordLevel(words, unk_token="a")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    settings = SETTINGS | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(tokenizer, name):
    template, refused = TEMPLATES[name], 0
    for messages in CONVERSATIONS.values():
        for given in GIVEN.values():
            given = {"add_generation_prompt": "continue_final_message" not in given} | given
            wanted, error = _transformers(tokenizer, template, messages, given)
            if error is None:
                assert chat.render(template, messages, SETTINGS, **given) == wanted
                continue
            refused += 1
            with pytest.raises(EngineError) as said:
                chat.render(template, messages, SETTINGS, **given)
            assert "continue_final_message" in given or error in str(said.value)
    assert refused < len(CONVERSATIONS) * len(GIVEN)


def _transformers(tokenizer, template, messages, given) -> tuple[str, str | None]:
    """The text, or the words of the error."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **given
        )
    except Exception as error:  # noqa: BLE001  whatever Jinja and Python raise
        return "", str(error).rstrip(".")
    return text.replace(LEFT_BEHIND, ""), None


def test_enough_templates_are_compared_and_most_render():
    assert len(TEMPLATES) >= 40
