"""What an ablation found: the list of its cells, and how they came to be.

Contract: `Results` is checked on construction and goes to disk without loss but for log-probabilities, which are kept in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsort.curriculum.ablation.results import file as results_file
from sparsort.curriculum.ablation.results.cells import Group
from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The cells of an ablation and how they came to be.

    Args:
        groups: cells; no two of the same task, selector, k and calibration. Not every one needs the same arms or sets.
        provenance: model, weights, dtype, device, machine, versions, recipe, date, seconds, tokens; values of JSON.

    Raises:
        SparsortError: no cell, or two of the same.
    """

    groups: list[Group]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        keys = [group.key for group in self.groups]
        if not keys:
            raise SparsortError("an ablation without a single finished cell has no results. Run it until one is done.")
        for group in self.groups:
            if keys.count(group.key) > 1:
                raise SparsortError(f"two cells of {group.title}; merge them before they become results.")

    def to_dict(self) -> dict[str, Any]:
        """Everything as values of JSON, arrays as nested lists. For a whole study use `save`: log_p has millions of entries."""
        groups, arrays = results_file.describe(self.groups)
        return {
            "provenance": self.provenance,
            "groups": groups,
            "arrays": {name: array.tolist() for name, array in arrays.items()},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Results:
        """The inverse of `to_dict`.

        Raises:
            SparsortError: something is missing or does not fit.
        """
        try:
            return cls(
                groups=results_file.rebuild(value["groups"], value["arrays"]), provenance=dict(value["provenance"])
            )
        except KeyError as error:
            raise SparsortError(f"results without {error}; expected what Results.to_dict gives.") from error

    def save(self, folder: Path | str) -> None:
        """Write `results.json` and `arrays.npz` into `folder`, replacing what was there.

        Raises:
            SparsortError: the folder cannot be written.
        """
        results_file.save(self.groups, self.provenance, Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> Results:
        """Read what `save` wrote.

        Raises:
            SparsortError: no results there, or files that do not belong together.
        """
        groups, provenance = results_file.load(Path(folder))
        return cls(groups=groups, provenance=provenance)
