"""Converts the GGUF files of a user once, and reads the result from the cache afterwards.

Contract: transformers takes 12 to 80 s of CPU time to read a GGUF file, mostly for the token list, and repeats this in every
process. `through_cache` saves the tokenizer, and the weights in each dtype, and loads them as long as the content of the file is
the same. The loaded objects equal the converted ones, bit for bit. The name of an entry depends on the SHA-256 of the file, on
the kind ("tokenizer", "float32", …) and on the versions of the converters. The name of a tokenizer also depends on the tokenizer
files next to the GGUF file, which transformers prefers. Each process hashes the file once, which takes 1 s per GB, because size
and time of a file do not prove that its content is the same.

If the cache cannot be written or is too small, the file is converted in every call, and a log message states the reason.
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

# To be increased when the saved files change.
_VERSION = 1
# The dtypes that weights are converted to, in the order in which a converted configuration is looked for.
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Files from which transformers may read a tokenizer, including code, which it runs only if it is trusted.
_TOKENIZER_FILES = (
    *("*token*.json", "*token*.model", "*.tiktoken", "spiece.model", "vocab*", "merges.txt", "config.json"),
    *("chat_template*", "additional_chat_templates/*", "*.py"),
)
# A hash is remembered only of files that are at least this old.
_SETTLED_SECONDS = 2.0
_LOG = logging.getLogger("sparsort")
_HASHES: dict[tuple[Path, int, int, int, int], bytes] = {}


def through_cache(
    file: Path,
    kind: str,
    *,
    convert: Callable[[], Any],
    save: Callable[[Any, Path], None],
    load: Callable[[Path], Any],
    size: Callable[[Any], int] = lambda value: 0,
    also: Mapping[str, str] | None = None,
) -> Any:
    """Convert a GGUF file, or load the result of an earlier conversion.

    Args:
        file: the GGUF file.
        kind: the name of the result, such as "tokenizer" or a dtype.
        convert: converts the file.
        save: saves the result to a folder, or raises a `SparsortError` with the reason why it cannot be cached.
        load: loads the result from the folder.
        size: the size of the result on the disk, in bytes.
        also: other facts that determine the result, such as `neighbours`.

    Raises:
        SparsortError: the limit of the cache is not a number.
    """
    # An invalid limit of the cache is reported before the conversion.
    limit_of("models")
    folder = models_folder() / _name_of(file, kind, also)
    if is_intact(folder):
        mark_used(folder)
        return load(folder)
    with _lock(folder):
        # Another process may have converted the file while this one waited for the lock.
        if is_intact(folder):
            return load(folder)
        note(f"Converting the {kind if kind == 'tokenizer' else f'{kind} weights'} of {file.name}, once, to {folder}")
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
    """The SHA-256 of a file, computed once per process as long as size, times and inode are unchanged."""
    status = file.stat()
    key = (file.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if key in _HASHES:
        return _HASHES[key]
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").digest()
    # A file that was written just now may change again without a change of its times, within their resolution.
    if time.time() - status.st_ctime > _SETTLED_SECONDS:
        _HASHES[key] = digest
    return digest


def neighbours(file: Path) -> dict[str, str]:
    """The names and SHA-256 of the files next to a GGUF file that transformers may read its tokenizer from.

    transformers prefers a `tokenizer.json` to the token list in the GGUF file, and reads settings and the chat template from
    others.
    """
    files = sorted({path for pattern in _TOKENIZER_FILES for path in file.parent.glob(pattern) if path.is_file()})
    return {path.relative_to(file.parent).as_posix(): sha256_of(path).hex() for path in files}


def converted_folder(file: Path) -> Path | None:
    """A folder with the configuration of a GGUF file, if its weights have been converted to any dtype."""
    folders = [models_folder() / _name_of(file, dtype) for dtype in DTYPES]
    return next((folder for folder in folders if is_intact(folder)), None)


def make_plain(model: Any) -> None:
    """Remove the mark of the quantiser from a dequantised model, because transformers refuses to save a model with it."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _name_of(file: Path, kind: str, also: Mapping[str, str] | None = None) -> str:
    key: dict[str, Any] = {
        "version": _VERSION,
        "sha256": sha256_of(file).hex(),
        "what": kind,
        "converters": [version("transformers"), version("gguf")],
    }
    if also:
        key["also"] = dict(also)
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', file.stem)[:60].strip('.-')}-{kind}-{digest_of_values(key)[:16]}"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # If the cache cannot be written, there is no lock. The error is reported when the result is saved.
        with contextlib.suppress(SparsortError):
            stack.enter_context(one_at_a_time(folder))
        yield
