"""docs/errors.md has an entry for every message, and none for another."""

import re
from pathlib import Path

from tests.docs.messages import messages, mistakes

PAGE = (Path(__file__).parents[2] / "docs/errors.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)


def best(entry):
    """Return the message that an entry is about: of those that fit, the fullest."""
    return max(
        (message for message in messages() if message.matches(entry)),
        key=lambda message: message.weight,
        default=None,
    )


def test_every_message_has_an_entry():
    described = {message.parts for message in map(best, ENTRIES) if message}
    missing = [str(m) for m in messages() if m.parts not in described]
    assert not missing, "add to docs/errors.md:\n" + "\n".join(missing)


def test_every_entry_is_a_message():
    assert [entry for entry in ENTRIES if best(entry) is None] == []


def test_messages_are_found_and_say_something():
    assert len(messages()) > 60
    vague = [m for m in messages() if m.weight < 8]
    assert [m.parts for m in vague] == [("", "() ", "")]  # Python's own, of a signature


def test_every_entry_says_more_than_the_message():
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    for section in sections:
        heading, _, rest = section.partition("\n")
        words = re.sub(r"```text\n.*?\n```", "", rest, flags=re.DOTALL).split()
        assert len(words) > 5, heading
        assert "```text" in section, heading


def test_every_entry_says_why_and_then_the_fix():
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        why, _, fix = section.rpartition("```\n")[2].partition("**Fix:**")
        assert len(why.split()) > 3, heading
        assert len(fix.split()) > 1, heading


def test_every_kind_of_mistake_is_described():
    table = set(re.findall(r"^\| `([a-z ]+)` \|", PAGE, re.MULTILINE))
    assert table >= mistakes() | {"unknown"}
    assert len(mistakes()) > 10
