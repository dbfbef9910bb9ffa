"""The fenced blocks of the documentation, and what its shell lines may be."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "text", "math", "json", "yaml", "toml")
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, and why it is not run, where it is not."""

    page: Path
    line: int
    language: str
    code: str
    why_not: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, names: dict[str, object]) -> None:
        """Execute Python; tracebacks show the page's own lines."""
        lines_before = "\n" * self.line
        exec(compile(lines_before + self.code, str(self.page), "exec"), names)

    def commands(self) -> list[list[str]]:
        """The words of each shell line, continued lines joined, comments and variables left out."""
        joined = self.code.replace("\\\n", " ")
        split = (shlex.split(line, comments=True) for line in joined.splitlines())
        lines = [[w for w in words if not re.match(r"[A-Z_]+=", w)] for words in split]
        return [words for words in lines if words]


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        code = textwrap.dedent(match["code"])
        found.append(Block(page, line, match["language"], code, match["why"]))
    return found


def name(page: Path) -> str:
    """A page by its path, as the tests call it."""
    return page.relative_to(ROOT).as_posix()
