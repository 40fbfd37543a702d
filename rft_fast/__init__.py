"""Robust fine-tuning paths between CLIP models: interpolate, perturb and prune, in place and fast.

The kernels (:func:`write_`, :func:`interpolate_`, :func:`perturb_`, :func:`add_`, :func:`norm`,
:func:`noise_like`, :func:`keep_mask_like`, :func:`offsets`, :class:`Plan`) work on any tensors;
:class:`Path` is a live model between a zero-shot and a fine-tuned one; :mod:`~rft_fast.studies` measures
along it, and :mod:`~rft_fast.results` reads what runs have measured.
"""

# Of the next release. What is built from a tagged commit names the tag's instead (setup.py).
__version__ = "0.2.0.dev0"

from typing import TYPE_CHECKING

from rft_fast.common import cwd as _cwd
from rft_fast.common import lazy as _lazy

_cwd.check()

if TYPE_CHECKING:
    from rft_fast import results, studies
    from rft_fast.kernels import (
        Plan,
        add_,
        interpolate_,
        keep_mask_like,
        noise_like,
        norm,
        offsets,
        perturb_,
        write_,
    )
    from rft_fast.path import Path
else:
    __getattr__, __dir__ = _lazy.face(
        __name__,
        kernels="Plan add_ interpolate_ keep_mask_like noise_like norm offsets perturb_ write_",
        path="Path",
    )

__all__ = [
    "Path",
    "Plan",
    "__version__",
    "add_",
    "interpolate_",
    "keep_mask_like",
    "noise_like",
    "norm",
    "offsets",
    "perturb_",
    "results",
    "studies",
    "write_",
]
