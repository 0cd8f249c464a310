"""A cache of what a model computed for rows, so that a second call runs the model only on rows that it has not read.

Contract: a value is found again only for the same token ids under the same context, and it is the value that was computed when
the row was first read, bit for bit. The key of a row is a digest of its token ids, with the borders of special tokens and
answer. These are all that a model reads of a row, so a change of text, prompt, chat template, tokenizer, truncation or length
limit that has any effect gives another key. The context is everything else that a value depends on: the weights, the dtype,
the device by its name, the versions and implementations that compute, and what is measured (`Measured`). Batches are not part
of it: as without a cache, a row that is read among other rows may differ by rounding.

On disk a context is a folder, named by a digest of it, of files that never change. A file holds the keys and values of one call
as safetensors, and its name is a digest of the context and of its bytes: a damaged file is one whose name does not fit, which is
removed, and its rows are read again. Files are written under a temporary name and renamed, without locks, so that processes on
several machines can share a home folder. Small files are merged when there are many. Where two processes read the same row at
once, one of the two values is used. The cache as a whole is bounded, see `sparsort.storage.cache`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.storage.cache import ROWS_SUFFIX, limit_of, make_room, mark_used
from sparsort.storage.files import cache_folder, disk_error, write_atomically
from sparsort.storage.integrity import digest_of_bytes, digest_of_values

if TYPE_CHECKING:
    from sparsort.scoring.model.backbone import Backbone
    from sparsort.scoring.prompts.prompt import Encoded

# Raised when the code computes other values for the same ids, so that older values are not taken for them.
VERSION = 1

# More files than this in one context are merged, except those that are large already.
_MOST_FILES = 32
_LARGE_BYTES = 8 * 2**20
# A merged file replaces others, which a process may be about to open: it lists the folder again.
_LISTINGS = 5
_KEY_BYTES = 16
# Where torch 2.9 and later keep the precision of float32, under torch.backends.
_BACKENDS = ("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv")
_LOG = logging.getLogger("sparsort")

Values = NDArray[Any]
Read = Callable[[list[int]], tuple[Values, list[str]]]


class RowCache:
    """Values of rows in the user's cache folder.

    Attributes:
        folder: where they are; `sparsort env` shows it, `sparsort cache --clear` empties it.
        from_cache: how many values this object has found, copies of a row in one call included.
        read: how many it did not find, so that the model read the rows.
    """

    def __init__(self) -> None:
        self.folder = cache_folder() / "rows"
        self.from_cache = self.read = 0
        self._contexts: dict[str, dict[bytes, Values]] = {}
        self._warned = False

    def summary(self) -> dict[str, int]:
        """The counts as JSON values."""
        return {"from_cache": self.from_cache, "read": self.read}

    def through(
        self, context: Mapping[str, Any], keys: Sequence[bytes], read: Read, *, rows_of_key: int = 1
    ) -> tuple[Values, list[str]]:
        """The values of rows, of which those are read that the cache does not hold.

        Args:
            context: JSON values, all that the values depend on apart from the rows.
            keys: a key for every row, such as `key_of` gives.
            read: takes the numbers of the rows to be read and gives their (n, width) values and reasons; a row with a reason
                has no values, and is not kept.
            rows_of_key: how many rows one key stands for, for the counts.

        Returns:
            The (N, width) values of all rows, and their reasons, "" for rows with values.
        """
        name = digest_of_values(context)
        held = self._held(name)
        # Each key once: copies of a row, read in other batches, could differ from what is kept.
        missing = {key: number for number, key in reversed(list(enumerate(keys))) if key not in held}
        self.from_cache += rows_of_key * (len(keys) - len(missing))
        self.read += rows_of_key * len(missing)
        fresh: dict[bytes, Values] = {}
        reasons: dict[bytes, str] = {}
        if missing:
            wanted = sorted(missing.values())
            values, why = read(wanted)
            fresh = {keys[number]: row for number, row in zip(wanted, values, strict=True)}
            reasons = {keys[number]: reason for number, reason in zip(wanted, why, strict=True) if reason}
            self._add(name, {key: row for key, row in fresh.items() if key not in reasons})
        rows = [fresh[key] if key in fresh else held[key] for key in keys]
        return np.stack(rows), [reasons.get(key, "") for key in keys]

    def _held(self, name: str) -> dict[bytes, Values]:
        """All values of a context, read from its files at the first use."""
        if name not in self._contexts:
            self._contexts[name] = {}
            files, _ = _read_folder(self.folder / name)
            for path in files:
                mark_used(path)
            self._contexts[name] = _joined(files.values())
        return self._contexts[name]

    def _add(self, name: str, found: Mapping[bytes, Values]) -> None:
        if not found:
            return
        self._contexts[name].update(found)
        try:
            path = _write(self.folder / name, found)
            _merge(self.folder / name)
            make_room("rows", keep={path})
        except SparsortError as error:
            # A cache that cannot be written costs time, and no result.
            if not self._warned:
                _LOG.warning("%s What was read is not kept for the next call.", error)
            self._warned = True


def is_kept() -> bool:
    """Whether the cache keeps anything: its limit may be 0."""
    return limit_of("rows") > 0


def obstacle(backbone: Backbone) -> str | None:
    """Why values of this model cannot be kept, in words; None if they can.

    The digest of the files says what a model computes only if it is as it was loaded. Values are therefore kept only for models
    that sparsort loaded by name for this backbone (`Backbone.mark_as_own`) and that have the same fingerprint. A caller who
    reaches into a scorer and edits its model in place through `.data` or `.numpy()` is not noticed, because torch counts no such
    edits (`model_fingerprint`): pass the edited model as an object, which has no cache.
    """
    loaded = backbone.loaded
    if backbone.fingerprint is None:
        return "the model was passed as an object, which may have been edited"
    if any(getattr(holder, "sparse_attention", None) is not None for holder in (loaded.model, loaded.model.config)):
        return "the model has an index branch, whose settings are no part of its weights"
    if not backbone.fingerprint.fits(loaded.model):
        return "the model has changed since it was loaded"
    if any(type(module).__module__.startswith("transformers_modules") for module in loaded.model.modules()):
        return "the model runs code of its own, which may change while its weights stay the same"
    if getattr(loaded.model, "_hf_peft_config_loaded", False):
        return "the model is an adapter, whose base model may change"
    return None


def context_of(backbone: Backbone, **measured: Any) -> dict[str, Any]:
    """What the values of rows depend on apart from their token ids, as JSON values.

    Args:
        backbone: the model.
        measured: what is computed from its states.

    Raises:
        SparsortError: values of this model cannot be kept.
    """
    import torch

    from sparsort.kernels.backend import device_name
    from sparsort.scoring.scorers.base import versions

    if (why := obstacle(backbone)) is not None:
        raise SparsortError(
            f"what this model computes cannot be kept: {why}. Leave cache= out, or pass the name or folder of a saved model."
        )
    loaded, kind = backbone.loaded, backbone.device.type
    return {
        "version": VERSION,
        "weights": loaded.weights,
        "dtype": str(loaded.dtype.value),
        "device": [kind, device_name(loaded.device.value)],
        "versions": versions(),
        # Each of these changes more than the rounding of a sum, or may.
        "attention": str(getattr(backbone.config, "_attn_implementation", None)),
        "matmul": _precision(),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "measured": measured,
    }


def _precision() -> dict[str, str | None]:
    """How float32 is multiplied: what the backends of this torch say, and its older setting where that can be read."""
    import torch

    found: dict[str, str | None] = {}
    for name in _BACKENDS:
        backend: Any = torch.backends
        for part in name.split(".") if name else ():
            backend = getattr(backend, part, None)
        found[name] = getattr(backend, "fp32_precision", None)
    try:
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to read the older setting once the newer ones were used.
        found["float32_matmul_precision"] = None
    return found


def key_of(item: Encoded) -> bytes:
    """The key of a row: a digest of its token ids and of the borders between special tokens, prompt and answer."""
    numbers = np.array([item.n_lead, item.answer_start, *item.ids], dtype="<i8")
    return hashlib.blake2b(numbers.tobytes(), digest_size=_KEY_BYTES).digest()


def key_of_all(items: Sequence[Encoded]) -> bytes:
    """The key of something that is computed from several rows together, in their order."""
    return hashlib.blake2b(b"".join(map(key_of, items)), digest_size=_KEY_BYTES, person=b"several rows").digest()


def _write(folder: Path, found: Mapping[bytes, Values]) -> Path:
    """Write one file, whose name fits its content.

    Raises:
        SparsortError: the disk refuses.
    """
    from safetensors.numpy import save

    keys = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    content = save({"keys": keys, "values": np.stack(list(found.values()))})
    path = folder / f"{_digest(folder, content)}{ROWS_SUFFIX}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # For its owner alone: the state of a text says something about the text.
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)
    return path


def _merge(folder: Path) -> None:
    """Join the small files of a folder that has many; a killed process leaves the old files, the new one, or both.

    Raises:
        SparsortError: the disk refuses.
    """
    try:
        small = {path for path in _files(folder) if path.stat().st_size < _LARGE_BYTES}
        if len(small) <= _MOST_FILES:
            return
        files, complete = _read_folder(folder)
        merged = _write(folder, _joined(files[path] for path in sorted(small & files.keys())))
        for path in small & files.keys() - {merged} if complete else ():
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        # Another process merges them.
        return
    except OSError as error:
        raise disk_error(folder, error) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ROWS_SUFFIX)


def _read_folder(folder: Path) -> tuple[dict[Path, dict[bytes, Values]], bool]:
    """The intact files of a folder, and whether it was read without one that went away."""
    files: dict[Path, dict[bytes, Values]] = {}
    for _attempt in range(_LISTINGS):
        try:
            listed = _files(folder)
        except OSError:
            return {}, True
        gone = False
        for path in listed:
            if path in files:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                gone = True
                continue
            except OSError:
                continue
            if (found := _parsed(folder, path, content)) is not None:
                files[path] = found
            else:
                _LOG.warning("%s is damaged; its rows are read again.", path)
                _discard(path)
        if not gone:
            return files, True
    return files, False


def _parsed(folder: Path, path: Path, content: bytes) -> dict[bytes, Values] | None:
    """Key to values, or None for a file that is not as it was written."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if path.stem != _digest(folder, content):
        return None
    try:
        tensors = load(content)
        keys, values = tensors["keys"], tensors["values"]
        return {row.tobytes(): value for row, value in zip(keys, values, strict=True)}
    except (SafetensorError, KeyError, ValueError):
        return None


def _joined(files: Iterable[Mapping[bytes, Values]]) -> dict[bytes, Values]:
    """One mapping; of a row that is in several files the first counts."""
    joined: dict[bytes, Values] = {}
    for found in files:
        for key, value in found.items():
            joined.setdefault(key, value)
    return joined


def _digest(folder: Path, content: bytes) -> str:
    return digest_of_bytes(folder.name.encode() + content)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _LOG.warning("%s cannot be removed.", path)
