"""Results on disk: `results.json` for what a person may read, `arrays.npz` beside it for the outcomes.

Contract: the JSON is written last. It holds the size and digest of the arrays that it belongs to, so that a pair torn by a kill
between the two writes is refused and never read as one, and a digest of itself. Log-probabilities are stored in fp32 and
predictions in 16 bits; all else comes back as it was. No pickle on either way.

JSON of format 1 has no digest of itself; it is read if it and the arrays fit together.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.results.cells import Arm, Group, SetInfo, arrays_of
from sparsort.errors import SparsortError
from sparsort.storage.files import write_atomically
from sparsort.storage.integrity import check_seal, damage, parse_own_json, record_of, write_sealed
from sparsort.terminal.interrupts import held

RESULTS = "results.json"
ARRAYS = "arrays.npz"
_FORMAT, _UNSEALED = "sparsort results 2", "sparsort results 1"
_AGAIN = "Run sparsort ablate again: it makes the results from its store."
_STORED = {"log_p": np.float32, "predicted": np.int16, "order_of_item": np.int16}


def describe(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """Groups as values of JSON, and their arrays by name: `<group>/<random or arms>/<field>`, stacked over arms."""
    described, arrays = [], {}
    for number, group in enumerate(groups):
        for part in ("random", "arms"):
            arms: list[Arm] = getattr(group, part)
            if arms:
                arrays.update({f"{number}/{part}/{name}": array for name, array in arrays_of(arms).items()})
            for place, arm in enumerate(arms):
                if arm.order_of_item is not None:
                    arrays[f"{number}/{part}/{place}/order_of_item"] = arm.order_of_item
        described.append(
            {
                "task": group.task,
                "selector": group.selector,
                "k": group.k,
                "calibrated": group.calibrated,
                "labels": group.labels,
                "items": group.items,
                "gold": group.gold,
                "sets": [dict(vars(one)) for one in group.sets],
                "demo_ids_of_item": group.demo_ids_of_item,
                "demo_texts": group.demo_texts,
                "item_texts": group.item_texts,
                "random": [_described_arm(arm) for arm in group.random],
                "arms": [_described_arm(arm) for arm in group.arms],
            }
        )
    return described, arrays


def _described_arm(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "kind": arm.kind, "order": arm.order}


def rebuild(groups: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any]) -> list[Group]:
    """The inverse of `describe`; arrays may be nested lists.

    Raises:
        SparsortError: a part is missing or does not fit.
    """
    try:
        return [_rebuilt(number, group, arrays) for number, group in enumerate(groups)]
    except (LookupError, RecursionError) as error:
        raise SparsortError(f"results without {error}; they were not written whole. Make them again.") from error
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise SparsortError(f"results with a part that does not fit ({error}). Make them again.") from error


def _rebuilt(number: int, group: Mapping[str, Any], arrays: Mapping[str, Any]) -> Group:
    shape = (len(group["sets"]), len(group["items"]), len(group["labels"]))

    def arms(part: str) -> list[Arm]:
        if not group[part]:
            return []
        stacked = {name: np.asarray(arrays[f"{number}/{part}/{name}"]) for name in ("predicted", "correct")}
        stacked |= {
            name: np.asarray(arrays[f"{number}/{part}/{name}"], float) for name in ("tokens", "choosing_tokens")
        }
        # Lists lose the sizes behind an empty axis, which is what generated answers have.
        stacked["log_p"] = np.asarray(arrays[f"{number}/{part}/log_p"], dtype=np.float64).reshape(
            len(group[part]), *shape
        )
        made = []
        for place, arm in enumerate(group[part]):
            by_item = arrays.get(f"{number}/{part}/{place}/order_of_item")
            made.append(
                Arm(
                    **arm,
                    **{name: array[place] for name, array in stacked.items()},
                    order_of_item=None if by_item is None else np.asarray(by_item, dtype=np.int64),
                )
            )
        return made

    plain = {name: group[name] for name in ("task", "selector", "k", "calibrated", "labels", "items", "gold")}
    return Group(
        **plain,
        sets=[SetInfo(**one) for one in group["sets"]],
        random=arms("random"),
        arms=arms("arms"),
        demo_ids_of_item=group["demo_ids_of_item"],
        # Results of earlier versions have no texts.
        demo_texts=group.get("demo_texts", {}),
        item_texts=group.get("item_texts", []),
    )


@held()
def save(groups: Sequence[Group], provenance: Mapping[str, Any], folder: Path) -> None:
    """Write results into `folder`: the arrays first, then the JSON that names their digest.

    Raises:
        SparsortError: the folder cannot be written.
    """
    described, arrays = describe(groups)
    stored = {
        name: array.astype(_STORED.get(name.rpartition("/")[2], array.dtype), copy=False)
        for name, array in arrays.items()
    }
    with write_atomically(folder / ARRAYS) as temporary:
        with temporary.open("wb") as handle:
            np.savez_compressed(handle, **stored)  # type: ignore[arg-type]
        record = record_of(temporary)
    write_sealed(
        folder / RESULTS,
        {"format": _FORMAT, "arrays": record, "provenance": dict(provenance), "groups": described},
    )


def find_results(folder: Path) -> Path:
    """The folder with the results: this one, or `results` inside it, as `sparsort ablate` leaves it.

    Raises:
        SparsortError: neither holds results.
    """
    if folder.is_file() and folder.name == RESULTS:
        return folder.parent
    for found in (folder, folder / "results"):
        if (found / RESULTS).is_file():
            return found
    raise SparsortError(
        f"no results in {folder}: there is no {RESULTS}. Expected the folder of sparsort ablate --out, or the folder "
        "'results' in it. An ablation that was stopped writes its results when it is run again to its end."
    )


def load(folder: Path) -> tuple[list[Group], dict[str, Any]]:
    """Read the cells and the provenance from `folder`, or from `results` inside it.

    Raises:
        SparsortError: no results there, results of another format, a damaged file, or files that do not belong together.
    """
    folder = find_results(folder)
    path = folder / RESULTS
    try:
        held = parse_own_json(path.read_bytes())
    except ValueError as error:
        raise SparsortError(f"{path} is not JSON ({error}). {_AGAIN}") from error
    if not isinstance(held, dict) or held.get("format") not in (_FORMAT, _UNSEALED):
        found = held.get("format") if isinstance(held, dict) else type(held).__name__
        raise SparsortError(f"{path} is of the format {found!r}, expected {_FORMAT!r}. {_AGAIN}")
    if held["format"] == _FORMAT:
        check_seal(held, path, next_step=_AGAIN)
    if not all(
        isinstance(held.get(name), kind) for name, kind in (("arrays", dict), ("provenance", dict), ("groups", list))
    ):
        raise SparsortError(f"{path} was not written whole. {_AGAIN}")
    arrays_path = folder / ARRAYS
    if not arrays_path.is_file():
        raise SparsortError(
            f"{ARRAYS} is missing beside {path}; the two belong together. Copy both, or make them again."
        )
    if not _is_recorded(arrays_path, held["arrays"]):
        raise SparsortError(
            f"{arrays_path} is not the file that {RESULTS} was written with: it is damaged, or a run was stopped between the "
            f"two, or is writing now. Wait for it. {_AGAIN}"
        )
    try:
        with np.load(arrays_path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise SparsortError(f"{arrays_path} cannot be read ({error}). {_AGAIN}") from error
    return rebuild(held["groups"], arrays), held["provenance"]


def _is_recorded(path: Path, record: Mapping[str, Any]) -> bool:
    if "sha256" not in record:
        return damage(path, record) is None
    with path.open("rb") as handle:  # format 1
        return bool(hashlib.file_digest(handle, "sha256").hexdigest() == record["sha256"])
