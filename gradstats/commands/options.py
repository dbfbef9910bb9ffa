"""Arguments and options that several commands take, as types of typer."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

AsJson = Annotated[bool, Option("--json", help="One JSON object.")]
Out = Annotated[Path | None, Option(help="Write the result here.")]
Seed = Annotated[int, Option(help="Of the model and the order of its data.")]
Target = Annotated[str, Argument(metavar="MODULE:FACTORY")]
