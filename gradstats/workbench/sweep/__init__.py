"""Equal-sample experiments: batch a for b steps against batch c for d steps, over seeds.

```python
from gradstats.workbench.sweep import Settings, parse, sweep

found = sweep(Settings("my_project:factory", parse("16x2000,64x500"), seeds=5), folder=Path("runs/sweep"))
for verdict in found.verdicts:
    print(verdict)
```
"""

from __future__ import annotations

from gradstats.workbench.sweep.plans import Plan, parse
from gradstats.workbench.sweep.run import Sweep, sweep
from gradstats.workbench.sweep.settings import Settings
from gradstats.workbench.sweep.sharpness import Sharpness
from gradstats.workbench.sweep.summary import Verdict

__all__ = ["Plan", "Settings", "Sharpness", "Sweep", "Verdict", "parse", "sweep"]
