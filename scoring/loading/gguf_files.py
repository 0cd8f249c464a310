"""A user's GGUF files: converted once, and read from the cache from then on.

Contract: transformers takes 12 to 80 s of CPU to read a GGUF file, most of it for the token list, and does so in every process.
`through_cache` saves the tokenizer and, in each dtype, the weights that it gave, and reads those as long as the file has the
same content. What is read is equal to what was converted, bit for bit. An entry is named by the SHA-256 of the file, what it
holds ("tokenizer", "float32", …), and the versions that converted it; that of a tokenizer also by the tokenizer files in the
file's folder, which transformers prefers to the file. The file is hashed once in every process, which takes
1 s per GB; size and time of a file do not show that its content is the same.

A cache that cannot be written, or is too small, costs only the time: the file is then read as it is, and a note says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.scoring.loading.conversions import install, is_intact, models_folder, no_room_for, one_at_a_time
from sparsort.storage.cache import limit_of, mark_used
from sparsort.storage.integrity import digest_of_values
from sparsort.terminal.printing import note

# Raised when what is saved of a file changes.
_VERSION = 1
# The dtypes that weights are converted to.
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What transformers may read a tokenizer from; its code too, if it is trusted.
_TOKENIZER_FILES = (
    *("*token*.json", "*token*.model", "*.tiktoken", "spiece.model", "vocab*", "merges.txt", "config.json"),
    *("chat_template*", "additional_chat_templates/*", "*.py"),
)
_SETTLED_SECONDS = 2.0
_LOG = logging.getLogger("sparsort")
_HASHES: dict[tuple[Path, int, int, int, int], bytes] = {}


def through_cache(
    file: Path,
    what: str,
    *,
    convert: Callable[[], Any],
    save: Callable[[Any, Path], None],
    load: Callable[[Path], Any],
    size: Callable[[Any], int] = lambda value: 0,
    also: Mapping[str, str] | None = None,
) -> Any:
    """What `convert` makes of a GGUF file: converted now, or loaded as it was saved before.

    Args:
        file: the GGUF file.
        what: a name for what is converted, such as "tokenizer" or a dtype.
        convert: reads the file.
        save: saves what was converted into a folder; a `SparsortError` says why it cannot be kept.
        load: reads it from the folder.
        size: the bytes that it will take on the disk.
        also: what else decides the result, such as `neighbours`.

    Raises:
        SparsortError: the limit of the cache is not a number.
    """
    # Before anything is converted for a cache that could not be bounded.
    limit_of("models")
    folder = models_folder() / _name_of(file, what, also)
    if is_intact(folder):
        mark_used(folder)
        return load(folder)
    with _turn(folder):
        if is_intact(folder):
            return load(folder)
        note(f"Converting the {what if what == 'tokenizer' else f'{what} weights'} of {file.name}, once, to {folder}")
        value = convert()
        obstacle = no_room_for(size(value))
        if obstacle is None:
            try:
                install(folder, lambda temporary: save(value, temporary))
            except SparsortError as error:
                obstacle = str(error)
        if obstacle is not None:
            _LOG.warning("%s is converted again in every call: %s", file, obstacle)
        return value


def sha256_of(file: Path) -> bytes:
    """SHA-256 of a file, computed once in a process while size, times and inode stay."""
    status = file.stat()
    key = (file.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if key in _HASHES:
        return _HASHES[key]
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").digest()
    # A file that was written just now may change again within the resolution of its times.
    if time.time() - status.st_ctime > _SETTLED_SECONDS:
        _HASHES[key] = digest
    return digest


def neighbours(file: Path) -> dict[str, str]:
    """Name and SHA-256 of the files in the folder of a GGUF file that transformers may read its tokenizer from.

    It prefers a `tokenizer.json` there to the token list in the file, and takes settings and a chat template from others.
    """
    found = sorted({path for pattern in _TOKENIZER_FILES for path in file.parent.glob(pattern) if path.is_file()})
    return {path.relative_to(file.parent).as_posix(): sha256_of(path).hex() for path in found}


def kept_folder(file: Path) -> Path | None:
    """A folder with the configuration of a GGUF file, if its weights have been converted in any dtype."""
    folders = [models_folder() / _name_of(file, dtype) for dtype in DTYPES]
    return next((folder for folder in folders if is_intact(folder)), None)


def make_plain(model: Any) -> None:
    """Remove the mark of the quantiser from a dequantised model, with which transformers refuses to save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _name_of(file: Path, what: str, also: Mapping[str, str] | None = None) -> str:
    key: dict[str, Any] = {
        "version": _VERSION,
        "sha256": sha256_of(file).hex(),
        "what": what,
        "converters": [version("transformers"), version("gguf")],
    }
    if also:
        key["also"] = dict(also)
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', file.stem)[:60].strip('.-')}-{what}-{digest_of_values(key)[:16]}"


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # Where the cache cannot be written there is nothing to wait for, and saving will say so.
        with contextlib.suppress(SparsortError):
            stack.enter_context(one_at_a_time(folder))
        yield
