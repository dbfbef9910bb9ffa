"""What a monitor knows, handed to logs and trackers while a network trains."""

from __future__ import annotations

from gradstats.loggers.about import About
from gradstats.loggers.files import CsvFile, JsonLines
from gradstats.loggers.log import Log, Row, Sink
from gradstats.loggers.reading import Logged, entry_of, read_lines, read_log

__all__ = [
    "About",
    "CsvFile",
    "JsonLines",
    "Log",
    "Logged",
    "Row",
    "Sink",
    "entry_of",
    "read_lines",
    "read_log",
]
