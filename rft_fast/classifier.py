"""Former name of :mod:`rft_fast.clip.classifier`, kept for scripts that import it."""

import sys
import warnings

from .clip import classifier

warnings.warn(
    "rft_fast.classifier is now rft_fast.clip.classifier; import that", DeprecationWarning, stacklevel=2
)
sys.modules[__name__] = classifier
