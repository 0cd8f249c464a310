"""A recipe of `sparsort train`: settings of training, curriculum and sparse attention in one TOML file.

Contract: the tables are `[train]` (fields of `TrainConfig`), `[curriculum]` (fields of `CurriculumSettings`), `[attention]`
(fields of `SparseAttentionConfig`, and freeze_base) and `[schedule]` (warmup_share, start, anneal_share). Unknown tables and keys
are refused with the nearest name. Settings of the caller override the recipe, and remove the settings of the recipe that would
contradict them. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsort.attention.config import SparseAttentionConfig
from sparsort.curriculum.ablation.recipe import tables
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.errors import SparsortError, unknown_choice
from sparsort.recipes.train.config import TrainConfig
from sparsort.recipes.train.sparse import SparseTraining

RECIPES = ("sparse", "sparse_retrofit", "sparse_moba", "sparse_nsa", "sparse_window")
_TABLES = ("train", "curriculum", "attention", "schedule")
_SCHEDULE = ("warmup_share", "start", "anneal_share")
_ORDER: tuple[str, ...] = ("mode", "schedule", "direction", "pacing", "stages", "folds", "warm_up", "later_epochs")
_ORDER += ("steps", "quotas", "group_by_length")
_CURRICULUM = tuple(field.name for field in dataclasses.fields(CurriculumSettings))
# Setting of the caller → the settings of a recipe that would contradict it.
_CONTRADICTED: dict[str, tuple[str, ...]] = {
    "plan": ("eval_share", *_CURRICULUM),
    "eval_data": ("eval_share",),
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
    "batch_size": ("token_budget",),
    "token_budget": ("batch_size", "packing", "pack_length"),
    "packing": ("token_budget",),
    "mode": _ORDER,
    "schedule": _ORDER,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a recipe; empty without a recipe.

    Attributes:
        train: fields of `TrainConfig`.
        curriculum: fields of `CurriculumSettings`.
        sparse: sparse attention; None if the recipe has none.
    """

    train: dict[str, Any] = field(default_factory=dict)
    curriculum: dict[str, Any] = field(default_factory=dict)
    sparse: SparseTraining | None = None

    def without(self, given: Collection[str]) -> Recipe:
        """The recipe without the settings that would contradict the given settings of the caller."""
        out = {name for setting in given for name in _CONTRADICTED.get(setting, ())}
        train, curriculum = (
            {name: value for name, value in table.items() if name not in out} for table in (self.train, self.curriculum)
        )
        return dataclasses.replace(self, train=train, curriculum=curriculum)


def read_recipe(recipe: str | Path | Mapping[str, Any] | None) -> Recipe:
    """Read a recipe by its name, from a TOML file, or from tables like those of such a file.

    Raises:
        SparsortError: no such recipe, a file that cannot be read, unknown tables or keys, or values that do not fit.
    """
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Mapping):
        return _build(recipe, "the recipe")
    if not isinstance(recipe, str | Path):
        raise SparsortError(
            f"a recipe is a name ({', '.join(RECIPES)}), the path of a .toml file, or tables as in a file, not {recipe!r}."
        )
    path = Path(recipe).expanduser()
    if str(recipe) in RECIPES:
        path = Path(__file__).parent / "presets" / f"{recipe}.toml"
    elif path.suffix != ".toml":
        raise unknown_choice("recipe", str(recipe), (*RECIPES, "<a file>.toml"))
    return _build(tables.read(path), str(path))


def _build(content: Mapping[str, Any], where: str) -> Recipe:
    if not content:
        raise SparsortError(
            f"{where} is empty, so it has the same effect as no recipe. Add a table ([{'], ['.join(_TABLES)}]), or omit "
            "the recipe."
        )
    for name, table in content.items():
        if name not in _TABLES:
            raise unknown_choice(f"table in {where}:", name, _TABLES)
        if not isinstance(table, Mapping):
            raise SparsortError(f"{where}: {name} is {table!r}; expected a table, [{name}], of settings.")
    train, curriculum = dict(content.get("train", {})), dict(content.get("curriculum", {}))
    with _named(where):
        # The caller may set `online`, so settings that need it are accepted here; `train` checks the combination.
        tables.build(TrainConfig, {"online": True, **train}, kind="[train] table", where=where)
    for name in curriculum:
        if name not in _CURRICULUM:
            raise unknown_choice(f"setting of [curriculum] in {where}:", name, _CURRICULUM)
    return Recipe(train=train, curriculum=curriculum, sparse=_sparse(content, where))


def _sparse(content: Mapping[str, Any], where: str) -> SparseTraining | None:
    if "attention" not in content:
        if "schedule" in content:
            raise SparsortError(
                f"{where}: [schedule] sets when attention is sparse, and there is no [attention]. Add it, such as "
                '[attention] with selector = "index_branch".'
            )
        return None
    attention, schedule = dict(content["attention"]), dict(content.get("schedule", {}))
    own = {"freeze_base": attention.pop("freeze_base")} if "freeze_base" in attention else {}
    names = [field.name for field in dataclasses.fields(SparseAttentionConfig)]
    for table, given, known in (("attention", attention, [*names, "freeze_base"]), ("schedule", schedule, _SCHEDULE)):
        for name in given:
            if name not in known:
                raise unknown_choice(f"setting of [{table}] in {where}:", name, known)
    with _named(where):
        config = tables.build(SparseAttentionConfig, attention, kind="[attention] table", where=where)
        return tables.build(SparseTraining, {"attention": config, **own, **schedule}, kind="recipe", where=where)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Add the name of the recipe to errors that lack it."""
    try:
        yield
    except SparsortError as error:
        if where in str(error):
            raise
        raise SparsortError(f"{where}: {error}") from error
