"""The learning-rate range test: a range, its spread, and the rule over batch sizes."""

from gradstats.workbench.lr_range.curve import Curve
from gradstats.workbench.lr_range.fingerprint import fingerprint
from gradstats.workbench.lr_range.result import LrRange
from gradstats.workbench.lr_range.scaling import Scaling, fit_scaling
from gradstats.workbench.lr_range.search import lr_range

__all__ = ["Curve", "LrRange", "Scaling", "fingerprint", "fit_scaling", "lr_range"]
