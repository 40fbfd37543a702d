"""Former name of :mod:`rft_fast.clip.endpoints`, kept for scripts that import it."""

import sys
import warnings

from .clip import endpoints

warnings.warn(
    "rft_fast.endpoints is now rft_fast.clip.endpoints; import that", DeprecationWarning, stacklevel=2
)
sys.modules[__name__] = endpoints
