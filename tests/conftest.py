"""What must be chosen before anything is imported.

Without a GPU, Triton's kernels run in its interpreter. Decoded images are not kept in the user's own cache.
"""

from __future__ import annotations

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_CACHE = tempfile.TemporaryDirectory()
os.environ["RFT_CACHE"] = _CACHE.name
