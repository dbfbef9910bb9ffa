"""Run the commands of docs/commands/ and put what they print there: python docs/outputs.py [PAGE ...]

Every block of shell lines that is followed by a block of text is run, in the order of the pages, from the
top of the repository; files go to runs/. Blocks marked as not run keep their text.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIR = re.compile(
    r"(?<!-->\n)(^```sh\n(?P<lines>gradstats [^`]*)```\n\n```text\n)(?:(?!```).*\n)*(```)",
    re.MULTILINE,
)
COLUMNS = 88  # of the pages' text blocks


def output(lines: str) -> str:
    """What the lines print to standard output, and to standard error where they fail."""
    printed = ""
    for line in lines.replace("\\\n", " ").strip().splitlines():
        words = shlex.split(line, comments=True)
        words = [sys.executable, "-m", *words]
        env = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        print(f"{line}: exit code {done.returncode}", file=sys.stderr)
        printed += done.stdout + (done.stderr if done.returncode else "")
    return folded(printed)


def folded(printed: str) -> str:
    """As a terminal of so many columns shows it, but between words."""
    shown = []
    for line in printed.splitlines():
        parts = textwrap.wrap(line, COLUMNS) if len(line.rstrip()) > COLUMNS else [line.rstrip()]
        shown += parts
    return "\n".join(shown).strip("\n") + "\n"


def main() -> None:
    pages = [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "docs" / "commands").glob("*.md"))
    for page in pages:
        text = page.read_text("utf-8")
        new = PAIR.sub(lambda found: found[1] + output(found["lines"]) + found[3], text)
        page.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
