"""Files that hold no readable weights: what they are, by their first bytes, and what to do."""

from __future__ import annotations

import json
import pathlib
import re
from typing import IO

SUPPORTED = (
    "safetensors files, files of torch.save, old and new, pickles of whole modules, and TorchScript archives"
)
FIRST = 512  # bytes that identify a file
_LARGEST_INDEX = 64 << 20  # bytes of JSON that are parsed; an index has about 100 KiB
_AGAIN = "Download it again, and compare its size with the size on its page"

# (First bytes, what such a file is and what to do.)
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"/annex/objects/", "is a git-annex pointer, not the weights. Fetch them: git annex get FILE"),
    (b"# xet version", "is a pointer of Hugging Face's Xet, not the weights. Download the file itself"),
    *(
        (key, "is a pointer of DVC, not the weights. Fetch them: dvc pull FILE")
        for key in (b"outs:\n", b"outs:\r\n", b"md5: ")
    ),
    *(
        (
            magic,
            "is a GGUF or GGML file of llama.cpp, with quantised weights. Use the checkpoint "
            "that it was converted from",
        )
        for magic in (b"GGUF", b"FUGG", b"ggml", b"lmgg", b"ggjt", b"tjgg", b"fmgg")
    ),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras, TensorFlow). Convert it to PyTorch first"),
    (b"\x93NUMPY", "is a single NumPy array, not the weights of a model"),
    *(
        (magic, f"is compressed ({how}). Unpack it and use the checkpoint inside")
        for magic, how in (
            (b"\x1f\x8b", "gzip"),
            (b"BZh", "bzip2"),
            (b"\xfd7zXZ\x00", "xz"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"\x04\x22\x4d\x18", "lz4"),
            (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
            (b"Rar!", "RAR"),
        )
    ),
    (b"SQLite format 3\x00", "is an SQLite database, not weights"),
    (b"%PDF", "is a PDF document, not weights"),
    *((magic, "is an image, not weights") for magic in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")),
    *((magic, "is a program or a compiled library, not weights") for magic in (b"\x7fELF", b"MZ\x90\x00")),
    *(
        (
            magic,
            "is a pickle of protocol 0 or 1, which is not supported. Load it with the program "
            "that wrote it, and save it with torch.save(model.state_dict(), ...)",
        )
        for magic in (
            *(b"(dp", b"(lp", b"(i__", b"}q\x00", b"]q\x00"),
            *(b"ccollections\n", b"ctorch", b"c__builtin__\n", b"ccopy_reg\n"),
        )
    ),
)
_ENDINGS = {
    ".msgpack": "is a Flax checkpoint. Load it with from_pretrained(..., from_flax=True), then save it",
    ".onnx": "is an ONNX graph. Use the PyTorch checkpoint that it was exported from",
    ".tflite": "is a TensorFlow Lite model. Use the PyTorch checkpoint that it was made from",
    **dict.fromkeys(
        (".index", ".meta", ".data", ".pb"),
        "is a part of a TensorFlow checkpoint. Convert it to PyTorch first",
    ),
}
_PAGE = re.compile(rb"<[a-z!?]", re.I)
_ONNX = re.compile(rb"\x08[\x01-\x1f]\x12.{1,2}(?:pytorch|onnx|tf2onnx|keras2onnx|skl2onnx)", re.S)
_LFS = re.compile(rb"version https?://(?:git-lfs|hawser)")
_LFS_SIZE = re.compile(rb"^size (\d{1,18})\s*$", re.M)


def why(stream: IO[bytes], file: pathlib.Path, head: bytes) -> str | None:
    """Recognise a file that holds no readable weights.

    Args:
        stream: the file; read as JSON if it starts like it.
        file: its path; the suffix identifies some formats.
        head: its first ``FIRST`` bytes.

    Returns:
        What it is and what to do, as the continuation of a sentence that starts with its name; None if
        unknown.
    """
    text = _without_mark(head).lstrip()
    if _LFS.match(text):
        size = _LFS_SIZE.search(text)
        stands_for = f" of {int(size[1]):,} bytes" if size else ""
        return (
            f"is a Git LFS pointer{stands_for}, not the weights. Fetch them: git lfs install && git lfs pull "
            "in its repository, or download the file itself"
        )
    if _PAGE.match(text):
        return (
            "is a web page (HTML or XML), not weights: the download ended at a login page, a "
            "confirmation or an error. Download the file itself (on Hugging Face and GitHub, its "
            "link contains /resolve/ or /raw/, not /blob/)"
        )
    if text[:1] == b"{":
        return _json(stream)
    for magic, answer in _BEGINNINGS:
        if head.startswith(magic) or text.startswith(magic):
            return answer
    if head[4:8] in (b"PTMF", b"TFL3"):
        return (
            "is a model for mobile devices, which has no names of weights. Use the checkpoint "
            "that it was made from"
        )
    if _ONNX.match(head):
        return _ENDINGS[".onnx"]
    if head[1:8] == b"\xa6params":  # MessagePack: a map with the key "params"
        return _ENDINGS[".msgpack"]
    if head[257:262] == b"ustar" or head.startswith(b"sys_info"):
        return (
            "is a tar archive. Unpack it and use the checkpoint inside. (Files of torch before "
            "0.4 are tar archives, too: load them with such a version and save them with a newer "
            "one)"
        )
    if not head.strip(b"\0"):
        return f"starts with {len(head)} zero bytes, as after an interrupted download. {_AGAIN}"
    ending = file.suffix.lower().partition("-")[0]  # .data-00000-of-00001
    if ending in _ENDINGS and not head.startswith((b"PK", b"\x80")):
        return _ENDINGS[ending]
    if _is_text(head):
        return f"is a text file, not weights (it starts with {_quoted(text)})"
    return None


def of_zip(names: list[str]) -> str:
    """Recognise a zip file without data.pkl.

    Args:
        names: its entries.

    Returns:
        As :func:`why`.
    """
    if names and all(name.endswith(".npy") for name in names):
        return "is an .npz file of NumPy, not a checkpoint. Save a dict of torch tensors by name instead"
    if any(name.endswith(".weights.h5") for name in names):
        return "is a model of Keras. Convert it to PyTorch first"
    endings = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl", ".tar", ".zip")
    if checkpoints := [name for name in names if name.endswith(endings)]:
        return f"is a zip archive. Unpack it and use the checkpoint inside, such as {_quoted(checkpoints[0])}"
    first = f", but {_quoted(names[0])}" if names else ""
    return f"is a zip archive, but not of torch.save: it has no data.pkl{first}"


def _without_mark(head: bytes) -> bytes:
    """Drop a byte order mark; UTF-16 becomes UTF-8."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return head.decode("utf-16", "replace").encode("utf-8", "replace")
    return head.removeprefix(b"\xef\xbb\xbf")


def _json(stream: IO[bytes]) -> str:
    stream.seek(0)
    text = stream.read(_LARGEST_INDEX + 1)
    if len(text) <= _LARGEST_INDEX:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and (answer := content.get("error") or content.get("message")):
            return f"is the response of a server, not weights: {_quoted(str(answer))}. {_AGAIN}"
    return (
        "is a JSON file, not weights: a configuration, an index or the response of a server. Name the file "
        "with the weights, or their folder"
    )


def _is_text(head: bytes) -> bool:
    for encoding in ("utf-8", "utf-16"):
        if encoding == "utf-16" and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        whole = len(head) - (len(head) % 2 if encoding == "utf-16" else 0)
        # The last character may be incomplete.
        for cut in range(4):
            try:
                text = head[: whole - cut].decode(encoding)
            except UnicodeDecodeError:
                continue
            return bool(text) and all(c.isprintable() or c.isspace() or c == "\ufeff" for c in text)
    return False


def _quoted(text: str | bytes) -> str:
    """Quote the first characters, control characters escaped."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return ascii(text[:40])
