"""What is known of CLIP: architectures, the two ends of a path, their heads and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .architectures import Preprocess, preprocess
    from .endpoints import Ends, Setup
    from .prompts import Prompts, class_names, templates
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        architectures="Preprocess preprocess",
        endpoints="Ends Setup",
        prompts="Prompts class_names templates",
    )

__all__ = ["Ends", "Preprocess", "Prompts", "Setup", "class_names", "preprocess", "templates"]
