"""The cost of studies, estimated before they run: work, time and memory.

No study is described a second time here. It runs on a path and an evaluator whose writer and executor only
count, so the counts are those of the run. A calibration measures what one of each counted thing takes on
this machine::

    work = cost.count(lambda path, evaluator: studies.sharpness(path, evaluator, ...), path, evaluator, sizes)
    costs = cost.flops(evaluator, work)
    rates = cost.calibrate(evaluator, path, costs, work)
    seconds = cost.forecast(work, rates)
"""

from .counting import CountedOthers, Counting, CountingWriter, count, counted_evaluator, counted_path
from .footprint import PRUNING, Memory, memory
from .operations import Flops, flops
from .rates import Rates, calibrate, forecast, images_wanted
from .table import Encoding, Line, table
from .work import Work

__all__ = [
    "PRUNING",
    "CountedOthers",
    "Counting",
    "CountingWriter",
    "Encoding",
    "Flops",
    "Line",
    "Memory",
    "Rates",
    "Work",
    "calibrate",
    "count",
    "counted_evaluator",
    "counted_path",
    "flops",
    "forecast",
    "images_wanted",
    "memory",
    "table",
]
