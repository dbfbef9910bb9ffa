"""Formulas in ```math blocks become MathML when the site is built, so that no script has to be fetched."""

from __future__ import annotations

import re
import textwrap

from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)```math\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with each page's text."""

    def formula(found: re.Match[str]) -> str:
        lines = [convert(line, display="block") for line in textwrap.dedent(found[2]).splitlines()]
        return f'{found[1]}<div class="formula">{"".join(lines)}</div>'

    return BLOCK.sub(formula, markdown)
