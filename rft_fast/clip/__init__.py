"""CLIP: architectures, prompts, and the two ends of a path with their heads.

=================  =======================================================================
module             holds
=================  =======================================================================
``allowed``        entries and values that an architecture file may have
``architectures``  name, file or repository -> configuration, preprocessing, towers
``tokenizers``     tokenizers of architectures
``matching``       which architecture weights are of; checks of names and activations
``prompts``        class names and templates, and their tokens
``classifier``     image tower and head, or both towers, as one module
``heads``          heads that checkpoints hold, and heads made from prompts
``endpoints``      two checkpoints -> the ends of a path, and the live model
=================  =======================================================================
"""

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
