"""One model made of several, and written: ``python -m rft_fast.merge``, or these names.

=============  ===================================================================
module         holds
=============  ===================================================================
``settings``   what is merged, how, and where it goes; options
``alphas``     a position for every layer: tables of patterns, LiNeS
``sources``    files that are read run by run of elements, and where names stand
``fit``        which files belong together; what is refused
``greedy``     greedy soups, and what methods need of data
``formulas``   the arithmetic of each method
``streamed``   the arithmetic of soups and Model Stock on models that come one after the other
``metadata``   what the result says of its origin
``writing``    safetensors and files of torch.save, written run by run
``work``       all of the above: :func:`run`
=============  ===================================================================
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .alphas import lines
    from .greedy import Greedy, greedy_soup
    from .settings import Request
    from .work import Outcome, provenance, run
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        alphas="lines",
        greedy="Greedy greedy_soup",
        settings="Request",
        work="Outcome provenance run",
    )

__all__ = ["Greedy", "Outcome", "Request", "greedy_soup", "lines", "provenance", "run"]
