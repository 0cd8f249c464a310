"""The results of an ablation: its cells and their provenance, in memory and on disk.

Contract: `Results` is checked on construction. On disk, `results.json` has what a person may read, and `arrays.npz` the outcomes.
The JSON file is written last, and contains the size and digest of the arrays' file as well as a digest of itself. If the process
is killed between the two writes, the files do not belong together, and `load` refuses them. Log-probabilities are stored in
float32 and predictions in 16 bits; everything else is read back without loss. Neither file uses pickle.

A JSON file of format 1 has no digest of itself. It is still read, if its arrays have the digest that it contains.

Shapes: A arms, S demonstration sets, Q test items, L labels.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.results.cells import Arm, Cell, SetInfo, arrays_of
from sparsort.errors import SparsortError
from sparsort.storage.files import write_atomically
from sparsort.storage.integrity import check_seal, damage, parse_own_json, record_of, write_sealed
from sparsort.terminal.interrupts import held

RESULTS = "results.json"
ARRAYS = "arrays.npz"
_FORMAT, _UNSEALED = "sparsort results 2", "sparsort results 1"
_AGAIN = "Run sparsort ablate again: it makes the results from its store."
# The dtypes on disk of arrays that are stored in fewer bits than in memory.
_STORED = {"log_p": np.float32, "predicted": np.int16, "order_of_item": np.int16}
# Key in the JSON file → attribute of `Cell`, for the attributes that need no conversion to JSON values.
_FIELDS = {
    **{name: name for name in ("task", "selector", "k")},
    "calibrated": "contextual",
    **{name: name for name in ("labels", "items", "gold", "demo_ids_of_item", "demo_texts", "item_texts")},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The cells of an ablation and their provenance.

    Args:
        cells: the cells. No two have the same key, but they may differ in their arms and sets.
        provenance: model, weights, dtype, device, machine, versions, recipe, date, seconds and tokens, as JSON values.

    Raises:
        SparsortError: there is no cell, or two cells have the same key.
    """

    cells: list[Cell]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        keys = [cell.key for cell in self.cells]
        if not keys:
            raise SparsortError("an ablation without a single finished cell has no results. Run it until one is done.")
        for cell in self.cells:
            if keys.count(cell.key) > 1:
                raise SparsortError(f"two cells of {cell.title}; merge them before they become results.")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, with arrays as nested lists. Use `save` for a large study, which has millions of numbers."""
        described, arrays = _describe(self.cells)
        return {
            "provenance": self.provenance,
            "groups": described,
            "arrays": {name: array.tolist() for name, array in arrays.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Results:
        """The inverse of `to_dict`.

        Raises:
            SparsortError: a part is missing or does not fit.
        """
        try:
            return cls(cells=_rebuild(value["groups"], value["arrays"]), provenance=dict(value["provenance"]))
        except KeyError as error:
            raise SparsortError(f"results without {error}; expected the value of Results.to_dict.") from error

    @held()
    def save(self, folder: Path | str) -> None:
        """Write `results.json` and `arrays.npz` into `folder`, and replace those that are there.

        Raises:
            SparsortError: the folder cannot be written.
        """
        folder = Path(folder)
        described, arrays = _describe(self.cells)
        stored = {
            name: array.astype(_STORED.get(name.rpartition("/")[2], array.dtype), copy=False)
            for name, array in arrays.items()
        }
        # The JSON file comes last and records the digest of these arrays. Until it is written, `load` refuses the new arrays,
        # because their digest is not the one in the old JSON file.
        with write_atomically(folder / ARRAYS) as temporary:
            with temporary.open("wb") as handle:
                np.savez_compressed(handle, **stored)  # type: ignore[arg-type]
            record = record_of(temporary)
        write_sealed(
            folder / RESULTS,
            {"format": _FORMAT, "arrays": record, "provenance": dict(self.provenance), "groups": described},
        )

    @classmethod
    def load(cls, folder: Path | str) -> Results:
        """Read the results in `folder`, or in `results` inside it.

        Raises:
            SparsortError: there are none, their format is unknown, a file is damaged, or the files do not belong together.
        """
        folder = find_results(Path(folder))
        content = _read_json(folder / RESULTS)
        arrays_path = folder / ARRAYS
        if not arrays_path.is_file():
            raise SparsortError(
                f"{ARRAYS} is missing next to {folder / RESULTS}; the two belong together. Copy both, or make them again."
            )
        if not _is_recorded(arrays_path, content["arrays"]):
            raise SparsortError(
                f"{arrays_path} is not the file that {RESULTS} was written with: it is damaged, or a run was stopped between "
                f"writing the two, or a run is writing them now. If one is, wait until it ends. {_AGAIN}"
            )
        try:
            with np.load(arrays_path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise SparsortError(f"{arrays_path} cannot be read ({error}). {_AGAIN}") from error
        return cls(cells=_rebuild(content["groups"], arrays), provenance=content["provenance"])


def find_results(folder: Path) -> Path:
    """The folder of the results: `folder` itself, or `results` inside it, where `sparsort ablate` puts them.

    Raises:
        SparsortError: there are no results.
    """
    if folder.is_file() and folder.name == RESULTS:
        return folder.parent
    for candidate in (folder, folder / "results"):
        if (candidate / RESULTS).is_file():
            return candidate
    raise SparsortError(
        f"no results in {folder}: there is no {RESULTS}. Expected the folder of sparsort ablate --out, or the folder "
        "'results' in it. An ablation that was stopped writes its results when it is run again to its end."
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The content of `results.json`. Its format, its digest and the types of its parts are checked, but not its cells."""
    try:
        content = parse_own_json(path.read_bytes())
    except ValueError as error:
        raise SparsortError(f"{path} is not JSON ({error}). {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") not in (_FORMAT, _UNSEALED):
        name = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise SparsortError(f"{path} is of the format {name!r}, expected {_FORMAT!r}. {_AGAIN}")
    if content["format"] == _FORMAT:
        check_seal(content, path, next_step=_AGAIN)
    parts = (("arrays", dict), ("provenance", dict), ("groups", list))
    if not all(isinstance(content.get(name), kind) for name, kind in parts):
        raise SparsortError(f"{path} was not written completely. {_AGAIN}")
    return content


def _is_recorded(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file has the size and digest that were recorded when it was written."""
    if "sha256" not in record:
        return damage(path, record) is None
    # Format 1 recorded the SHA-256 alone.
    with path.open("rb") as handle:
        return bool(hashlib.file_digest(handle, "sha256").hexdigest() == record["sha256"])


def _describe(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """The cells as JSON values, and their arrays by name: `<cell>/<random or arms>/<field>`, stacked over arms."""
    described, arrays = [], {}
    for number, cell in enumerate(cells):
        for part in ("random", "arms"):
            arms: list[Arm] = getattr(cell, part)
            if arms:
                # All arms of a cell have the same shapes, so one array per field is enough.
                arrays.update({f"{number}/{part}/{name}": array for name, array in arrays_of(arms).items()})
            # Only some arms have this array, so it is not stacked.
            for place, arm in enumerate(arms):
                if arm.order_of_item is not None:
                    arrays[f"{number}/{part}/{place}/order_of_item"] = arm.order_of_item
        fields = {key: getattr(cell, name) for key, name in _FIELDS.items()}
        fields["sets"] = [dict(vars(info)) for info in cell.sets]
        for part in ("random", "arms"):
            fields[part] = [{"name": arm.name, "kind": arm.kind, "order": arm.order} for arm in getattr(cell, part)]
        described.append(fields)
    return described, arrays


def _rebuild(described: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any]) -> list[Cell]:
    """The inverse of `_describe`; arrays may be nested lists.

    Raises:
        SparsortError: a part is missing or does not fit.
    """
    try:
        return [_rebuild_cell(number, cell, arrays) for number, cell in enumerate(described)]
    except (LookupError, RecursionError) as error:
        raise SparsortError(f"results without {error}; they were not written completely. Make them again.") from error
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise SparsortError(f"results with a part that does not fit ({error}). Make them again.") from error


def _rebuild_cell(number: int, cell: Mapping[str, Any], arrays: Mapping[str, Any]) -> Cell:
    # Results of earlier versions have no texts.
    complete = {"demo_texts": {}, "item_texts": [], **cell}
    return Cell(
        **{name: complete[key] for key, name in _FIELDS.items()},
        sets=[SetInfo(**info) for info in cell["sets"]],
        random=_rebuild_arms(number, "random", cell, arrays),
        arms=_rebuild_arms(number, "arms", cell, arrays),
    )


def _rebuild_arms(number: int, part: str, cell: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Arm]:
    if not cell[part]:
        return []
    prefix = f"{number}/{part}"
    stacked = {name: np.asarray(arrays[f"{prefix}/{name}"]) for name in ("predicted", "correct")}
    stacked |= {name: np.asarray(arrays[f"{prefix}/{name}"], float) for name in ("tokens", "choosing_tokens")}
    # A nested list loses the lengths of all axes after an empty one, and generated answers have L = 0, so the shape is restored.
    shape_SQL = (len(cell["sets"]), len(cell["items"]), len(cell["labels"]))
    log_p = np.asarray(arrays[f"{prefix}/log_p"], dtype=np.float64)
    stacked["log_p"] = log_p.reshape(len(cell[part]), *shape_SQL)
    arms = []
    for place, arm in enumerate(cell[part]):
        by_item = arrays.get(f"{prefix}/{place}/order_of_item")
        arms.append(
            Arm(
                **arm,
                **{name: array[place] for name, array in stacked.items()},
                order_of_item=None if by_item is None else np.asarray(by_item, dtype=np.int64),
            )
        )
    return arms
