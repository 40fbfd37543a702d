"""Former name of :mod:`rft_fast.clip.architectures`, kept for scripts that import it."""

import sys
import warnings

from .clip import architectures

warnings.warn(
    "rft_fast.architectures is now rft_fast.clip.architectures; import that", DeprecationWarning, stacklevel=2
)
sys.modules[__name__] = architectures
