"""Long contexts against transformers: windows with sinks, and latents, both with positions that are
stretched past what a model was made for. All families, recurrent ones among them, and up to 5,000
tokens are `python -m bench soak lengths`; other ways to stretch are in `test_positions`."""

import pytest
from support import lengths

WINDOW, ORIGINAL = 100, 300  # tokens; both are crossed


@pytest.mark.parametrize("case", ["gpt_oss, yarn", "deepseek_v2, yarn"])
def test_logits_are_those_of_transformers_across_windows_and_stretched_positions(case, tmp_path):
    compared = lengths.compare(case, tmp_path, (600,), WINDOW, ORIGINAL)
    assert compared.good, compared
    assert compared.context >= 600 and not compared.beyond
