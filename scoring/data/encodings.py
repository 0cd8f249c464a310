"""Text files as a stream of UTF-8 bytes: plain or gzipped, and converted if a byte order mark names another encoding.

Contract: `open_utf8` returns a binary handle. A file with the mark of UTF-16 or UTF-32, such as spreadsheets and PowerShell
write, is converted while it is read, in bounded memory. The bytes of any other file, including a UTF-8 mark, are unchanged.
`skip` moves to an offset in that stream. A converted stream is read up to the offset, because the file has other offsets.
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

# The errors of reading a text file if the file is damaged or the disk fails.
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)
_CHUNK = 1 << 16  # bytes
# UTF-32 is tested first, because its little-endian mark begins with the mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def open_utf8(path: Path) -> IO[bytes]:
    """Open a text file as a stream of UTF-8 bytes.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read, or its suffix is .gz and it is not a gzip file.
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
    """Move a handle that `open_utf8` has just returned to the byte `offset`."""
    if handle.seekable():
        handle.seek(offset)
    while offset and not handle.seekable():
        # At the end of the file nothing is read, which ends the loop.
        offset -= len(handle.read(min(offset, _CHUNK))) or offset


def wrong_encoding(name: str, line: int, offset: int, byte: int) -> SparsortError:
    """The error for a byte that is not UTF-8, `offset` bytes into the (decompressed) file."""
    return SparsortError(
        f"{name}, line {line}: byte 0x{byte:02x} at offset {offset} is not valid UTF-8. Save the file as UTF-8. "
        f"If its encoding is Windows-1252, for example: {_as_utf8(Path(name), 'WINDOWS-1252')}"
    )


def nul_bytes(name: str, line: int, raw: bytes, offset: int) -> SparsortError:
    """The error for NUL bytes in `raw`, a text that begins `offset` bytes into the (decompressed) file."""
    # In UTF-16, an ASCII character is its ASCII byte and a NUL. The NULs are at odd offsets if the low byte comes first.
    start = offset % 2
    at_odd, at_even = raw[1 - start :: 2].count(0), raw[start::2].count(0)
    encoding = "UTF-16BE" if at_even > at_odd else "UTF-16LE"
    return SparsortError(
        f"{name}, line {line} contains NUL bytes, which do not occur in text. The file is damaged, or it is UTF-16 without a "
        f"byte order mark. In the second case save it as UTF-8: {_as_utf8(Path(name), encoding)}"
    )


def shell_command(path: Path, command: str, suffix: str) -> str:
    """A shell command that converts a text file, plain or gzipped.

    Args:
        path: the file, as the user named it.
        command: the filter to apply, such as "jq -c .".
        suffix: the end of the name of the output, in the same folder: "-rows.jsonl" turns "a.json.gz" into "a-rows.jsonl".
    """
    is_packed = path.suffix.lower() == ".gz"
    stem = Path(path.stem).stem if is_packed else path.stem
    file, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(stem + suffix)))
    return f"gunzip -c {file} | {command} > {new}" if is_packed else f"{command} {file} > {new}"


def _as_utf8(path: Path, encoding: str) -> str:
    kind = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return shell_command(path, f"iconv -f {encoding} -t UTF-8", f"-utf8{kind}")


class _Converted(io.RawIOBase):
    """The remaining bytes of `handle`, converted from `encoding` to UTF-8."""

    def __init__(self, handle: IO[bytes], encoding: str) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._encoding = encoding
        self._ready = b""
        self._at_end = False
        self._failure: UnicodeDecodeError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._at_end:
            if self._failure is not None:
                raise self._failure
            chunk = self._handle.read(_CHUNK)
            self._at_end = not chunk
            self._ready = self._converted(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _converted(self, chunk: bytes) -> bytes:
        try:
            return self._decoder.decode(chunk, final=self._at_end).encode()
        except UnicodeDecodeError as error:
            # The text before the error is returned first, so that the reader can count the lines up to the error.
            self._failure, self._at_end = error, False
            return error.object[: error.start].decode(self._encoding).encode()

    def close(self) -> None:
        self._handle.close()
        super().close()
