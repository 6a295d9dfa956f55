"""Sizes as people write them: what is read, what is asked back, what is refused."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smoe.runtime import EngineError
from smoe.runtime.sizes import parse_size, show_size

KIB, MIB, GIB, TIB = (1 << power for power in (10, 20, 30, 40))

READ = {
    "4Gi": 4 * GIB, "4GiB": 4 * GIB, "4G": 4 * GIB, "4g": 4 * GIB, "4gib": 4 * GIB, "4GIB": 4 * GIB,
    "1T": TIB, "1TiB": TIB, "1TB": 10**12, "1Pi": 1 << 50, "64MiB": 64 * MIB, "64Mi": 64 * MIB,
    "512 MB": 512 * 10**6, "512mb": 512 * 10**6, "8KiB": 8 * KIB, "8kB": 8000, "1.5G": 3 * GIB // 2,
    "1.5GiB": 3 * GIB // 2, "1,5GiB": 3 * GIB // 2, "1,5 Gi": 3 * GIB // 2, " 2 GiB ": 2 * GIB,
    "0.5GiB": GIB // 2, "0,25G": GIB // 4, "1e9": 10**9, "1E9": 10**9, "1.5e9": 15 * 10**8,
    "1e3MiB": 1000 * MIB, "4294967296": 4 * GIB, "1048576": MIB, "7B": 7, "4096 b": 4096,
    2**33: 2**33, MIB: MIB,
}  # fmt: skip

REFUSED = {
    "is not a size": [
        "", " ", "much", "nan", "inf", "-inf", "NaN", "GiB", "4GiBB", "4 Gi B", "4Zi", "1.GiB",
        ".5GiB", "1..5G", "1,5,0G", "1.500,5GiB", "+4GiB", "0x10MiB", "4GiB\x00", "٤GiB", "1e9999",
        "4\u202fGiB!", "9" * 5000, "🦆",
    ],
    "less than a byte": ["0", "0MiB", "-5", "-5MiB", "-1e9", "0.0", "1e-10GiB", "0e9", 0, -5],
    "more than any machine": ["1e400", "1e99GiB", "5000PiB", "9" * 400, "2e18", 10**30],
    "can be read in two ways": ["1,500MiB", "4,096", "1,000 MB", "512,000KiB"],
    "is not a size; give an integer": [None, True, 64e6, 1.5, b"64MiB", ["64MiB"], {}],
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_what_people_write_is_read(text):
    assert parse_size(text) == READ[text]


@pytest.mark.parametrize(("said", "text"), [(s, t) for s, texts in REFUSED.items() for t in texts])
def test_what_is_no_size_is_a_sentence(said, text):
    with pytest.raises(EngineError, match=said) as caught:
        parse_size(text)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["4096", "64", "512", "8.5", "1e5", 4096, 16])
def test_a_bare_small_number_asks_whether_mib_was_meant(text):
    with pytest.raises(EngineError, match=f"Was {text}MiB meant. Write {text}MiB"):
        parse_size(text)
    assert parse_size(f"{text}MiB") == float(text) * MIB, "what it says can be given back"


def test_both_readings_that_are_offered_can_be_given_back():
    with pytest.raises(EngineError, match="write 1500MiB or 1.500MiB"):
        parse_size("1,500MiB")
    assert parse_size("1500MiB") == 1500 * MIB and parse_size("1.500MiB") == 3 * MIB // 2


@given(st.text())
@example("1e")
def test_any_text_is_a_size_or_a_sentence(text):
    with contextlib.suppress(EngineError):
        assert 1 <= parse_size(text) <= 1 << 60


@given(st.integers(MIB, 1 << 50))
def test_what_is_shown_rounded_up_is_no_less(size):
    assert size <= parse_size(show_size(size, up=True)) <= size + MIB // 8
