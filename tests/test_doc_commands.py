"""Every shell line of the documentation runs, as it stands or smaller, and says what its page shows."""

from __future__ import annotations

import re
import shlex

import pytest
from doc_blocks import PAGES, Block, blocks, name
from doc_commands import NOT_RUN, SMALLER, WRITTEN_BY, Shell, why_not

SHELL = {
    name(page): found
    for page in PAGES
    if (found := [b for b in blocks(page) if b.language == "sh" and not b.why_not])
}
LINES = [shlex.join(words) for found in SHELL.values() for b in found for words in b.commands()]
WORD = r"[^\W\d_][\w-]*\b(?!…)"  # not one that a narrow table cuts off
# Beginnings of lines that are said only where the figures are such.
VARIES = {"Known", "The", "Use", "Well", "expected samples", "expected steps", "expected time"}


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    return Shell(tmp_path_factory.mktemp("user"))


@pytest.fixture(autouse=True)
def as_a_user(shell: Shell, monkeypatch) -> None:
    """In the user's folder, whose modules are found there."""
    monkeypatch.chdir(shell.folder)
    monkeypatch.syspath_prepend(shell.folder)


@pytest.mark.parametrize("page", SHELL)
def test_shell_lines_run(page: str, shell: Shell) -> None:
    for block in SHELL[page]:
        said = ""
        for words in block.commands():
            line = shlex.join(words)
            if why_not(line) is None:
                ended = shell.run(line)
                assert ended.code == 0, f"{block.place}: {line}\n{ended.out}"
                said += ended.out
        shown = shown_after(block)
        if shown is not None:
            missing = sorted(word for word in shape(shown) - VARIES if word not in said)
            assert not missing, f"{block.place}: its page shows {missing}, not in\n{said}"
            new = sorted(word for word in shape(said) - VARIES if word not in shown)
            assert not new, f"{block.place}: its page lacks {new}, of\n{said}"
            cut = re.search(r"\w+…", shown)
            assert cut is None, f"{block.place}: its page cuts off {cut and cut[0]}"


def shown_after(block: Block) -> str | None:
    """The output that follows a block, where there is one."""
    end = block.line + block.code.count("\n") + 1
    after = (b for b in blocks(block.page) if b.line == end + 2 and b.language == "text")
    return next((b.code for b in after), None)


def shape(text: str) -> set[str]:
    """What output holds whatever the figures: the headings of its tables, and what its lines begin with.

    Sentences begin with a capital, rows of a list with a name that two blanks follow.
    """
    found = set()
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch(r" *─+ *", below):
            found |= set(re.findall(WORD, line))
        elif begins := re.match(rf"([A-Z][\w-]*)|({WORD}(?: {WORD})*)  ", line):
            found.add(begins[1] or begins[2])
    return found


def test_what_is_not_run_is_needed_and_is_all() -> None:
    assert {why_not(line) for line in LINES} == {None, *NOT_RUN}


def test_what_makes_lines_smaller_is_used() -> None:
    for begins in SMALLER:
        assert any(line.startswith(begins) for line in LINES), begins
    words = {word for line in LINES for word in shlex.split(line)}
    assert set(WRITTEN_BY) <= words
