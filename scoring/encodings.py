"""Text files as a stream of UTF-8 bytes: plain or gzipped, and converted where a byte order mark names another encoding.

Contract: `open_utf8` yields a binary handle. A file with the mark of UTF-16 or UTF-32, which spreadsheets and PowerShell write,
is converted while it is read, in bounded memory. Any other file is passed on byte by byte, its UTF-8 mark included. `skip`
moves to an offset in that stream; a converted stream is read up to there, since its offsets are not those of the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import shlex
import zlib
from pathlib import Path
from typing import IO, Any, cast

from sparsort.errors import SparsortError

# What reading a text file raises when the file is damaged or the disk fails.
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)
_CHUNK = 1 << 16
# The mark of UTF-32 begins with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def open_utf8(path: Path) -> IO[bytes]:
    """The file's text as UTF-8 bytes.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read, or is not the gzip file that its suffix promises.
    """
    packed = path.suffix.lower() == ".gz"
    handle = cast(IO[bytes], gzip.open(path, "rb") if packed else path.open("rb"))  # noqa: SIM115 (the caller closes it)
    try:
        head = handle.read(4)
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                handle.seek(len(mark))
                return io.BufferedReader(_Converted(handle, encoding))
        handle.seek(0)
    except BaseException:
        handle.close()
        raise
    return handle


def skip(handle: IO[bytes], offset: int) -> None:
    """Move a handle of `open_utf8` that is at its beginning to the byte `offset`."""
    if handle.seekable():
        handle.seek(offset)
    while offset and not handle.seekable():
        offset -= len(handle.read(min(offset, _CHUNK))) or offset


def wrong_encoding(name: str, line: int, offset: int, byte: int) -> SparsortError:
    """The error for a byte that is not UTF-8, `offset` bytes into the (decompressed) file."""
    file = Path(name).name
    new = f"utf8-{file.removesuffix('.gz')}"
    source = f"gunzip -c {shlex.quote(file)} | iconv" if file.endswith(".gz") else "iconv"
    last = "" if file.endswith(".gz") else f" {shlex.quote(file)}"
    return SparsortError(
        f"{name}, line {line}: byte 0x{byte:02x} at offset {offset} is not valid UTF-8. Save the file as UTF-8. "
        f"If its encoding is Windows-1252, for example: {source} -f WINDOWS-1252 -t UTF-8{last} > {shlex.quote(new)}"
    )


def nul_bytes(name: str, line: int) -> SparsortError:
    """The error for a line of text that holds NUL bytes."""
    return SparsortError(
        f"{name}, line {line} holds NUL bytes, which text does not have. The file is damaged, or it is UTF-16 without a "
        "byte order mark. In the second case save it as UTF-8: iconv -f UTF-16LE -t UTF-8"
    )


class _Converted(io.RawIOBase):
    """The rest of `handle`, decoded from `encoding` and encoded as UTF-8."""

    def __init__(self, handle: IO[bytes], encoding: str) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._ready = b""
        self._at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._at_end:
            chunk = self._handle.read(_CHUNK)
            self._at_end = not chunk
            self._ready = self._decoder.decode(chunk, final=self._at_end).encode()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._handle.close()
        super().close()
