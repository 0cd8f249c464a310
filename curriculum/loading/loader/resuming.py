"""The state of a loader, the check that a loader can resume from it, and the fingerprints of the data in it.

Contract: a state consists of JSON values of less than 1 KiB for any number of rows: a position, which is the number of global
batches consumed, and fingerprints of the plan and of the data. A loader resumes only with the same plan over the same data.
Ranks, workers, prefetching and micro-batches may differ, because the order of global batches does not depend on them. For any
other state the error names the difference and the next step.

A fingerprint of the data consists of the number of rows and a digest of each column over at most 16 rows at fixed positions (the
first, the last, and evenly spaced between them). It costs 32 reads for any N, and does not detect a change in other rows. It
depends on values, not on containers: lists, tuples, NumPy arrays and torch tensors of the same numbers are equal, so a dataset
may change its output format. Floats are compared as float32. All missing values (None, NaN, …; see `sparsort.values`) are equal,
since a data library may turn one into the other. For objects other than numbers, strings, bytes, lists and mappings only the
name of the type counts. Each row is read twice. A column that differs between the two readings is random (augmentation), does
not identify the data, and is skipped. The global generators of torch, NumPy and `random` are restored afterwards.
(`verification` compares the data with the plan.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from sparsort.errors import SparsortError
from sparsort.storage.integrity import check_version
from sparsort.values import is_missing

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

Fingerprint = str | dict[str, Any]

FORMAT = "sparsort-loader"
VERSION = 1
# These settings are written out in a state, so that an error can name them; one digest covers all others.
_SPELLED = ("batch_size", "token_budget", "seed", "mode", "schedule", "direction", "stages", "steps")
_OR_RESTART = "or start again without this state"

MOST_ROWS = 16
# Keeps a state below 1 KiB.
MOST_COLUMNS = 12
_LONGEST_NAME = 24
_DIGEST_BYTES = 5
# Key of the digests that sparsort 0.1.0 computed for columns with NaN, which it treated as a value. They are compared with the
# states that it wrote, and are not written into new states.
_WITH_NAN = "with_nan"


def make_state(plan: CurriculumPlan, data: Fingerprint, *, epoch: int, batch: int) -> dict[str, Any]:
    """The state of a loader after `batch` global batches of `epoch`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.fingerprint,
        "data": as_saved(data),
        "settings": _settings(plan),
        "epoch": epoch,
        "batch": batch,
    }


def position_of(
    state: Any, plan: CurriculumPlan, data: Fingerprint, *, repeats: int | None = None
) -> tuple[int, int, int]:
    """The epoch, batch and turn to resume with; after a complete epoch, the beginning of the next one.

    Args:
        state: the value that `state_dict` returned.
        plan: the plan of the loader.
        data: the fingerprint of the data of the loader.
        repeats: how often the loader yields every generation batch; None if it does not load groups.

    Raises:
        SparsortError: the state is not one of a loader, belongs to another version, plan or data, or to a batch that the plan
            does not have.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise SparsortError(
            f"this is not a state of a CurriculumLoader: {_shortened(state)}. Pass the value that its state_dict() returned."
        )
    damaged = f"Resume from an earlier one, {_OR_RESTART}."
    other = f"Resume with the sparsort that wrote it, {_OR_RESTART}."
    check_version(state.get("version"), (VERSION,), "the state", damaged=damaged, other=other)
    if missing := [name for name in ("plan", "data", "epoch", "batch") if name not in state]:
        raise SparsortError(f"the state has no {missing[0]!r}, so it is damaged. {damaged}")
    if state.get("plan") != plan.fingerprint:
        raise SparsortError(_another_plan(state, plan))
    if differs := difference(state.get("data"), data):
        raise SparsortError(
            f"the data is not the data that the state was written for: {differs}. Resume with that data, {_OR_RESTART}. "
            "If the data is the same and only looks different, give both runs the same CurriculumLoader(fingerprint='a name')."
        )
    epoch, batch = state.get("epoch"), state.get("batch")
    if not _counts(epoch) or not _counts(batch) or batch > plan.n_batches:
        raise SparsortError(
            f"the state is at epoch {epoch!r}, batch {batch!r}, and the plan has {plan.n_batches} batches per epoch. The "
            f"state is damaged: resume from an earlier one, {_OR_RESTART}."
        )
    turn = state.get("turn", 0)
    if not _counts(turn) or turn >= (1 if repeats is None else repeats):
        raise SparsortError(
            f"the state was written after a generation batch was yielded {turn!r} times, and this loader yields "
            f"{'no generation batches' if repeats is None else f'each of them {repeats} times'}. Resume with the same groups=, "
            f"{_OR_RESTART}."
        )
    return (epoch + 1, 0, 0) if batch == plan.n_batches else (epoch, batch, turn)


def _another_plan(state: Mapping[str, Any], plan: CurriculumPlan) -> str:
    saved, now = state.get("settings"), _settings(plan)
    saved = saved if isinstance(saved, Mapping) else {}
    size = saved.get("batch_size")
    if size is not None and size != now["batch_size"]:
        return (
            f"the state was written with a global batch of {size} and this plan has {now['batch_size'] or 'a token budget'}, "
            f"which gives another order. Keep per-device batch × accumulation × processes = {size} and plan with "
            f"batch_size={size}, {_OR_RESTART}."
        )
    differing = [f"{name} {saved[name]!r} → {now[name]!r}" for name in _SPELLED if saved.get(name) != now[name]]
    if differing:
        reason = f"plans differ in {', '.join(differing)}"
    elif saved.get("others") != now["others"]:
        reason = "plans differ in a setting such as pacing, folds, quotas, packing or max_length"
    elif plan.revision is not None or saved.get("revision") is not None:
        reason = f"plan was revised (revision {saved.get('revision') or 'none'} → {now['revision'] or 'none'})"
    else:
        reason = "settings are the same, so the plans were made from different scores, groups or lengths"
    return (
        f"the state was written with another plan ({state.get('plan')}, and this is {plan.fingerprint}): the {reason}. "
        f"Load that plan with CurriculumPlan.open, {_OR_RESTART}."
    )


def _settings(plan: CurriculumPlan) -> dict[str, Any]:
    every = plan.settings.to_json()
    others = json.dumps({name: value for name, value in every.items() if name not in _SPELLED}, sort_keys=True)
    digest = hashlib.blake2b(others.encode(), digest_size=5).hexdigest()
    revision = plan.revision["number"] if plan.revision else None
    return {**{name: every[name] for name in _SPELLED}, "others": digest, "revision": revision}


def _counts(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shortened(value: Any) -> str:
    text = f"keys {', '.join(map(str, list(value)[:5]))}" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def fingerprint_of(dataset: Any, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """The fingerprint of a map-style dataset, as JSON values of at most 600 bytes.

    Args:
        dataset: any object with `len` and `[row]`. Mappings get one digest per column, other examples a single one.
        columns: the columns to digest; None for all. The first 12 by name are kept.

    Raises:
        SparsortError: a column does not exist.
    """
    places = places_of(len(dataset))
    return {"rows": len(dataset), **_columns(lambda: [dataset[place] for place in places], columns)}


def places_of(n: int) -> list[int]:
    """The rows of the sample out of n: the first, the last, and evenly spaced ones between them, at most 16."""
    return sorted({i * (n - 1) // (MOST_ROWS - 1) for i in range(MOST_ROWS)}) if n else []


def fingerprint_of_stream(stream: Iterable[Any], n_rows: int) -> dict[str, Any]:
    """The fingerprint of a stream: `n_rows` and digests over its first 16 rows."""
    return {"rows": n_rows, **_columns(lambda: list(islice(stream, MOST_ROWS)), None)}


def as_saved(fingerprint: Fingerprint) -> Fingerprint:
    """The part of a fingerprint that is written into a state."""
    if isinstance(fingerprint, str):
        return fingerprint
    return {name: value for name, value in fingerprint.items() if name != _WITH_NAN}


def difference(saved: Any, current: Fingerprint) -> str | None:
    """A description of how the data of a saved fingerprint differs from the current data; None if it does not.

    Columns that both fingerprints have are compared. There must be such a column, unless one of the two has no columns.
    """
    if isinstance(saved, str) or isinstance(current, str):
        return None if saved == current else f"it was saved as {_named(saved)} and this is {_named(current)}"
    if not isinstance(saved, Mapping) or saved.get("rows") != current["rows"]:
        rows = saved.get("rows") if isinstance(saved, Mapping) else saved
        return f"it had {rows} rows and this has {current['rows']}"
    before, now = saved.get("columns", {}), current["columns"]
    if before and now and not set(before) & set(now):
        return f"it had the columns {', '.join(before)} and this has {', '.join(now)}"
    with_nan = current.get(_WITH_NAN, {})
    changed = [name for name in now if name in before and before[name] not in (now[name], with_nan.get(name))]
    return f"other values in {', '.join(name or 'its examples' for name in changed)}" if changed else None


def _columns(read: Callable[[], list[Any]], columns: Sequence[str] | None) -> dict[str, dict[str, str]]:
    with random_state_restored():
        examples = read()
        # The second reading shows which columns are random. `earlier` is the digest that sparsort 0.1.0 would have
        # computed.
        first, second = _digests(examples, columns), _digests(read(), columns)
        earlier = _digests(examples, columns, nan_is_a_value=True)
    stable = dict(sorted((name, digest) for name, digest in first.items() if second.get(name) == digest)[:MOST_COLUMNS])
    with_nan = {name: earlier[name] for name, digest in stable.items() if earlier[name] != digest}
    return {"columns": stable, **({_WITH_NAN: with_nan} if with_nan else {})}


def _named(fingerprint: Any) -> str:
    return f"fingerprint={fingerprint!r}" if isinstance(fingerprint, str) else "data without a name of its own"


def _digests(examples: list[Any], columns: Sequence[str] | None, *, nan_is_a_value: bool = False) -> dict[str, str]:
    if not all(isinstance(example, Mapping) for example in examples):
        return {"": _digest(examples, nan_is_a_value)}
    names = list(dict.fromkeys(name for example in examples for name in example))
    if columns is not None:
        if missing := [name for name in columns if examples and name not in names]:
            raise SparsortError(
                f"there is no column {missing[0]!r} for the fingerprint; the data has {', '.join(map(str, names))}."
            )
        names = list(columns)
    return {_short(str(name)): _digest([example.get(name) for example in examples], nan_is_a_value) for name in names}


def _short(name: str) -> str:
    return name if len(json.dumps(name)) - 2 <= _LONGEST_NAME else f"#{_digest(name)}"


def _digest(value: Any, nan_is_a_value: bool = False) -> str:
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in _canonical(value, nan_is_a_value):
        # The length before each part distinguishes ("ab", "c") from ("a", "bc").
        hashed.update(struct.pack("<q", len(part)) + part)
    return hashed.hexdigest()


def _canonical(value: Any, nan_is_a_value: bool) -> Iterator[bytes]:
    """The value as a sequence of byte strings; the first letter of each tells the kind of the value."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, recognised without importing torch
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or (not nan_is_a_value and is_missing(value)):
        yield b"0"
    # bool is tested before int, since True and False are integers too.
    elif isinstance(value, bool):
        yield b"b1" if value else b"b0"
    elif isinstance(value, int):
        yield b"i%d" % value
    elif isinstance(value, float):
        yield b"f" + np.array([value]).astype(np.float32).tobytes()
    elif isinstance(value, str):
        yield b"s" + value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes | bytearray):
        yield b"y" + bytes(value)
    elif isinstance(value, Mapping):
        yield b"m%d" % len(value)
        for name in sorted(value, key=str):
            yield from _canonical(str(name), nan_is_a_value)
            yield from _canonical(value[name], nan_is_a_value)
    elif isinstance(value, list | tuple):
        yield b"l%d" % len(value)
        for item in value:
            yield from _canonical(item, nan_is_a_value)
    else:
        yield b"o" + type(value).__qualname__.encode()


@contextlib.contextmanager
def random_state_restored() -> Iterator[None]:
    """Restore the state of the global generators of torch, NumPy and `random` at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    tensor = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch:
            torch.set_rng_state(tensor)
