"""A report of trainings and measurements as one HTML file.

```python
from pathlib import Path
from gradstats.workbench import report

made = report.build(report.read([Path("run.jsonl"), Path("sweep.json")]))
print(made.verdict.headline)
Path("report.html").write_text(report.render(made), "utf-8")
```
"""

from __future__ import annotations

from gradstats.workbench.report.findings import Fact, Verdict
from gradstats.workbench.report.inputs import Input, read
from gradstats.workbench.report.making import Report, build
from gradstats.workbench.report.page import render

__all__ = ["Fact", "Input", "Report", "Verdict", "build", "read", "render"]
