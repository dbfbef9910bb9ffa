"""The commands of the command line, a file each: its options, and how its result is shown.

Each file has `register(application)`, which adds a function to a typer application. It imports what it
needs within that function, so that `--help` is quick.
"""

COMMANDS = (
    "doctor",
    "check",
    "measure",
    "watch",
    "vram",
    "lr_range",
    "sweep",
    "critical",
    "advise",
    "report",
    "bench",
    "demo",
)
