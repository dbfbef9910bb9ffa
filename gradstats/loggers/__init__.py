"""What a monitor knows, handed to logs and trackers while a network trains."""

from __future__ import annotations

from gradstats.loggers.files import CsvFile, JsonLines, read_lines, row_of
from gradstats.loggers.log import Log, Row, Sink

__all__ = ["CsvFile", "JsonLines", "Log", "Row", "Sink", "read_lines", "row_of"]
