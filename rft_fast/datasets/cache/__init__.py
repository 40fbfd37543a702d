"""Decoded images on disk, so that every image is decoded once: uint8, memory-mapped. See :mod:`.file`."""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .access import Entry, Images, decoded, directory, entries
    from .file import File, Pixels, Source
    from .storage import size
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        storage="size",
        file="File Pixels Source",
        access="Entry Images decoded directory entries",
    )

__all__ = ["Entry", "File", "Images", "Pixels", "Source", "decoded", "directory", "entries", "size"]
