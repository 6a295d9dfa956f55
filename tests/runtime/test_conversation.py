"""What a conversation loses when it outgrows its context."""

from smoe.runtime.conversation import Conversation


def _words(messages):
    """One token a character, so that room is easy to count."""
    return [ord(c) for message in messages for c in message["content"]]


def test_messages_are_the_system_and_every_turn_in_order():
    talk = Conversation("s", [("u", "a")])
    roles = [(message["role"], message["content"]) for message in talk.messages("v")]
    assert roles == [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]


def test_the_oldest_turns_go_until_the_rest_fits_and_the_system_stays():
    talk = Conversation("s", [("aaaa", "bbbb"), ("cc", "dd"), ("e", "f")])
    assert talk.fitting("g", _words, 16) == (_words(talk.messages("g")), 0)
    for room, dropped in ((15, 1), (8, 1), (7, 2), (4, 2), (3, 3), (2, 3)):
        ids, gone = talk.fitting("g", _words, room)
        assert (bytes(ids).decode()[0], gone) == ("s", dropped)
    assert len(talk.turns) == 3, "only an answer makes it final"
    talk.answered("g", "h", 2)
    assert talk.turns == [("e", "f"), ("g", "h")]


def test_a_line_that_alone_is_too_long_is_returned_as_it_is():
    ids, gone = Conversation(None, [("a", "b")]).fitting("x" * 9, _words, 5)
    assert (len(ids), gone) == (9, 1)
