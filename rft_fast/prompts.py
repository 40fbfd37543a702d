"""Former name of :mod:`rft_fast.clip.prompts`, kept for scripts that import it."""

import sys
import warnings

from .clip import prompts

warnings.warn("rft_fast.prompts is now rft_fast.clip.prompts; import that", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = prompts
