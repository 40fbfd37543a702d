"""What studies cost, told before they run: how much they do, how long it takes, how much memory it needs.

Nothing of a study is written down a second time here. It is run on stand-ins, an evaluator and a path
that only count, so that the counts are right whatever it does. A calibration then measures what one of
each counted thing takes on this machine::

    work = cost.count(lambda path, evaluator: studies.sharpness(path, evaluator, ...), path, evaluator, sizes)
    costs = cost.flops(evaluator, work)
    rates = cost.calibrate(evaluator, path, costs, work)
    seconds = cost.forecast(work, rates)
"""

from .counting import Counting, CountingWriter, count, counted_evaluator, counted_path
from .footprint import Memory, memory
from .operations import Flops, flops
from .rates import Rates, calibrate, forecast, images_wanted
from .table import Encoding, Line, duration, table
from .work import Work

__all__ = [
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
    "duration",
    "flops",
    "forecast",
    "images_wanted",
    "memory",
    "table",
]
