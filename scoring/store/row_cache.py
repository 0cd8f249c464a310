"""A cache of the values that a model computed for rows, so that a second call runs the model only on new rows.

Contract: a value is reused only for the same token ids in the same context, and it is bit for bit the value that was computed
when the row was first read. The key of a row is a digest of its token ids and of the borders between special tokens, prompt and
answer. The model reads nothing else of a row, so any change of text, prompt, chat template, tokenizer, truncation or length
limit that has an effect gives another key. The context is everything else that a value depends on: the weights, the dtype, the
name of the device, the versions and implementations that compute, and the measurement. It does not include the batches: as
without a cache, the value of a row may differ by rounding if the row is read together with other rows.

On disk, a context is a folder of files that never change, and its name is a digest of the context. A file has the keys and values
of one call as safetensors, and its name is a digest of the context and of its bytes. If the name does not match, the file is
damaged; it is removed, and its rows are read again. Files are written under a temporary name and renamed, without locks, so that
processes on several machines can share a home folder. Many small files are merged. If two processes read the same row at the same
time, one of the two values is used. The size of the cache is bounded, see `sparsort.storage.cache`.
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

# To be increased when the code computes other values for the same ids, so that older values are not reused.
VERSION = 1

# If a context has more small files than this, they are merged.
_MAX_FILES = 32
_LARGE_BYTES = 8 * 2**20
# Another process may merge files while this one reads them. The folder is then listed again, at most this often.
_MAX_LISTINGS = 5
_KEY_BYTES = 16
# The modules of torch.backends that have the setting `fp32_precision`, in torch 2.9 and later.
_BACKENDS = ("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv")
_LOG = logging.getLogger("sparsort")

Values = NDArray[Any]
Read = Callable[[list[int]], tuple[Values, list[str]]]


class RowCache:
    """The values of rows in the user's cache folder.

    Attributes:
        folder: path of the cache; `sparsort env` prints it, and `sparsort cache --clear` empties it.
        from_cache: number of values that came from the cache, including those of repeated rows in one call.
        read: number of values that the model had to compute.
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
        """Return the values of rows, and compute those that are not in the cache.

        Args:
            context: JSON values: everything that the values depend on, except the rows.
            keys: the key of every row; see `key_of`.
            read: takes the numbers of the rows to read, and returns their (n, width) values and their reasons. A row with a
                reason has no value, and is not cached.
            rows_of_key: number of rows per key, for the counts.

        Returns:
            The (N, width) values of all rows, and their reasons, which are "" for rows with values.
        """
        name = digest_of_values(context)
        cached = self._values_of(name)
        # Each key is read once, because the values of equal rows in other batches could differ from the cached one by rounding.
        missing = {key: number for number, key in reversed(list(enumerate(keys))) if key not in cached}
        self.from_cache += rows_of_key * (len(keys) - len(missing))
        self.read += rows_of_key * len(missing)
        fresh: dict[bytes, Values] = {}
        reasons: dict[bytes, str] = {}
        if missing:
            numbers = sorted(missing.values())
            values, why = read(numbers)
            fresh = {keys[number]: row for number, row in zip(numbers, values, strict=True)}
            reasons = {keys[number]: reason for number, reason in zip(numbers, why, strict=True) if reason}
            self._add(name, {key: row for key, row in fresh.items() if key not in reasons})
        rows = [fresh[key] if key in fresh else cached[key] for key in keys]
        return np.stack(rows), [reasons.get(key, "") for key in keys]

    def _values_of(self, name: str) -> dict[bytes, Values]:
        """All values of a context, which are read from its files on first use."""
        if name not in self._contexts:
            files, _ = _read_folder(self.folder / name)
            for path in files:
                mark_used(path)
            self._contexts[name] = _joined(files.values())
        return self._contexts[name]

    def _add(self, name: str, values: Mapping[bytes, Values]) -> None:
        if not values:
            return
        self._contexts[name].update(values)
        try:
            path = _write(self.folder / name, values)
            _merge(self.folder / name)
            make_room("rows", keep={path})
        except SparsortError as error:
            # If the cache cannot be written, the next call takes longer, but the results are the same.
            if not self._warned:
                _LOG.warning("%s The computed values are not cached for the next call.", error)
            self._warned = True


def is_enabled() -> bool:
    """Whether values are cached at all; the user may have set the limit to 0."""
    return limit_of("rows") > 0


def obstacle(backbone: Backbone) -> str | None:
    """The reason why values of this model cannot be cached, as a clause; None if they can.

    The digest of the weight files identifies the model only if it is unchanged since it was loaded. Values are therefore cached
    only for a model that sparsort loaded by name for this backbone (`Backbone.mark_as_own`), and whose fingerprint is the same.
    If a caller edits the model of a scorer in place through `.data` or `.numpy()`, this is not noticed, because torch does not
    count such edits (see `fingerprint`). An edited model must be passed as an object, which is never cached.
    """
    loaded = backbone.loaded
    if backbone.fingerprint is None:
        return "the model was passed as an object, which may have been edited"
    if any(getattr(owner, "sparse_attention", None) is not None for owner in (loaded.model, loaded.model.config)):
        return "the model has an index branch, whose settings are not part of its weights"
    if not backbone.fingerprint.fits(loaded.model):
        return "the model has changed since it was loaded"
    if any(type(module).__module__.startswith("transformers_modules") for module in loaded.model.modules()):
        return "the model runs its own code, which may change while its weights stay the same"
    if getattr(loaded.model, "_hf_peft_config_loaded", False):
        return "the model is an adapter, whose base model may change"
    return None


def context_of(backbone: Backbone, **measured: Any) -> dict[str, Any]:
    """Everything that the values of rows depend on, except their token ids, as JSON values.

    Args:
        backbone: the model.
        measured: the settings of the measurement.

    Raises:
        SparsortError: values of this model cannot be cached.
    """
    import torch

    from sparsort.kernels.backend import device_name
    from sparsort.scoring.scorers.base import versions

    if (reason := obstacle(backbone)) is not None:
        raise SparsortError(
            f"the values of this model cannot be cached: {reason}. Do not pass cache=, or pass the name or folder of a model."
        )
    loaded, kind = backbone.loaded, backbone.device.type
    return {
        "version": VERSION,
        "weights": loaded.weights,
        "dtype": str(loaded.dtype.value),
        "device": [kind, device_name(loaded.device.value)],
        "versions": versions(),
        # Each of these settings may change a value by more than the rounding of a sum.
        "attention": str(getattr(backbone.config, "_attn_implementation", None)),
        "matmul": _precision(),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "measured": measured,
    }


def _precision() -> dict[str, str | None]:
    """The precision of float32 products: the settings of all backends and, if it can be read, the older global setting."""
    import torch

    settings: dict[str, str | None] = {}
    for name in _BACKENDS:
        backend: Any = torch.backends
        for part in name.split(".") if name else ():
            backend = getattr(backend, part, None)
        settings[name] = getattr(backend, "fp32_precision", None)
    try:
        settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to read the older setting once a newer one was used.
        settings["float32_matmul_precision"] = None
    return settings


def key_of(item: Encoded) -> bytes:
    """The key of a row: a digest of its token ids and of the borders between special tokens, prompt and answer."""
    numbers = np.array([item.n_lead, item.answer_start, *item.ids], dtype="<i8")
    return hashlib.blake2b(numbers.tobytes(), digest_size=_KEY_BYTES).digest()


def key_of_all(items: Sequence[Encoded]) -> bytes:
    """The key of a value that is computed from several rows together, in their order."""
    return hashlib.blake2b(b"".join(map(key_of, items)), digest_size=_KEY_BYTES, person=b"several rows").digest()


def _write(folder: Path, values: Mapping[bytes, Values]) -> Path:
    """Write one file under the digest of its content, or raise a `SparsortError` if the disk cannot be written."""
    from safetensors.numpy import save

    keys = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    content = save({"keys": keys, "values": np.stack(list(values.values()))})
    path = folder / f"{_digest(folder, content)}{ROWS_SUFFIX}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Readable only for its owner, because the state of a text reveals something about the text.
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)
    return path


def _merge(folder: Path) -> None:
    """Merge the small files of a folder that has many, or raise a `SparsortError` if the disk cannot be written."""
    try:
        small = {path for path in _files(folder) if path.stat().st_size < _LARGE_BYTES}
        if len(small) <= _MAX_FILES:
            return
        files, complete = _read_folder(folder)
        # The merged file is written before the others are removed, so a process that is killed in between loses no values.
        merged = _write(folder, _joined(files[path] for path in sorted(small & files.keys())))
        for path in small & files.keys() - {merged} if complete else ():
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        # Another process is merging the same files.
        return
    except OSError as error:
        raise disk_error(folder, error) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ROWS_SUFFIX)


def _read_folder(folder: Path) -> tuple[dict[Path, dict[bytes, Values]], bool]:
    """The intact files of a folder, and whether no file disappeared while they were read."""
    files: dict[Path, dict[bytes, Values]] = {}
    for _attempt in range(_MAX_LISTINGS):
        try:
            listing = _files(folder)
        except OSError:
            return {}, True
        # Another process may replace files by a merged one, which is in the next listing.
        gone = False
        for path in listing:
            if path in files:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                gone = True
                continue
            except OSError:
                continue
            if (values := _parsed(folder, path, content)) is not None:
                files[path] = values
            else:
                _LOG.warning("%s is damaged; its rows are read again.", path)
                _discard(path)
        if not gone:
            return files, True
    return files, False


def _parsed(folder: Path, path: Path, content: bytes) -> dict[bytes, Values] | None:
    """The values of a file by key; None if the file is damaged."""
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
    """Join the values of several files. If several files have the same key, the first one is used."""
    joined: dict[bytes, Values] = {}
    for values in files:
        for key, value in values.items():
            joined.setdefault(key, value)
    return joined


def _digest(folder: Path, content: bytes) -> str:
    return digest_of_bytes(folder.name.encode() + content)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _LOG.warning("%s cannot be removed.", path)
