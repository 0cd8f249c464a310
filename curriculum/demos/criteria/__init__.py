"""The criteria by which an order of demonstrations, or a query's demonstrations, are chosen with the model in the loop.

Contract: `CRITERIA` is the one place that lists them; higher is better for all. To add one, add an entry and its name to
`CriterionName`. Nothing here imports NumPy or calls a model: whoever holds the model fills an `Evidence` and pays for it.
`Criterion.choose` breaks ties as `ranking.choose` does and says how many there were. "a+b" names the mean rank of several.

Formulas, costs and traps stand with the functions: `label_criteria`, `density`, `mdl_and_cone`.

Shapes: O candidate orders, P probe queries, L labels, F state metrics, C content-free inputs, Q queries, W candidates
of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.registry import Entry, Registry, load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparsort.curriculum.demos.criteria.distributions import Floats
    from sparsort.curriculum.demos.criteria.ranking import Choice

CriterionName = Literal[
    "globale",
    "locale",
    "globale_unlabelled",
    "locale_unlabelled",
    "pdo",
    "pdo_prior",
    "pdo_null",
    "best_on_dev",
    "best_on_dev_likelihood",
    "density",
    "density_gain",
    "density_rank",
    "mdl",
    "cone",
]
Need = Literal["log_p", "gold", "prior", "content_free", "features", "bare_features", "sampled", "loss"]
# The fields that hold every metric of a state, with their axes.
_METRIC_AXES: dict[str, tuple[str, ...]] = {"features": ("orders", "probes"), "bare_features": ("probes",)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the model has been asked, for one set of demonstrations; a criterion reads what it needs of it.

    Attributes:
        log_p: (O, P, L) scores of the labels; for "mdl" (Q, W, L).
        gold: (P,) positions of the right labels.
        prior: (L,) shares or counts of the labels.
        content_free: (O, C, L) scores of the labels on content-free inputs, uncalibrated.
        features: (O, P, F) metrics of the state from which the answer is predicted.
        bare_features: (P, F) the same without demonstrations.
        metrics: F names.
        metric: which of them the density criteria read.
        denser_is_higher: its direction; by default that of the metric of this name in `METRICS`.
        loss: (Q, W) mean negative log-likelihood of a query's tokens after each candidate, for "cone".
    """

    log_p: Any = None
    gold: Any = None
    prior: Any = None
    content_free: Any = None
    features: Any = None
    bare_features: Any = None
    metrics: Sequence[str] = ()
    metric: str = "l0_relative"
    denser_is_higher: bool | None = None
    loss: Any = None

    def argument(self, name: Need) -> Any:
        """A field as a criterion's function takes it: of `features` and `bare_features` the chosen metric alone."""
        value = getattr(self, name)
        if name not in _METRIC_AXES:
            return value
        from sparsort.curriculum.demos.criteria.distributions import numbers

        array = numbers(value, (*_METRIC_AXES[name], "metrics"), what=name)
        if len(self.metrics) != array.shape[-1]:
            raise SparsortError(f"{name} holds {array.shape[-1]} metrics, but {len(self.metrics)} names were given.")
        if self.metric not in self.metrics:
            raise unknown_choice("metric", self.metric, self.metrics)
        return array[..., list(self.metrics).index(self.metric)]

    def denser_higher(self) -> bool:
        """Whether a higher value of the chosen metric means a denser state."""
        if self.denser_is_higher is not None:
            return self.denser_is_higher
        if self.metric not in METRICS:
            raise SparsortError(
                f"whether a higher {self.metric!r} means a denser state is not known. Pass denser_is_higher=True or False."
            )
        return not METRICS[self.metric].higher_is_sparser


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion(Entry):
    """A criterion by name. `needs` names the fields of `Evidence` that it reads; "sampled" says that the probes are to be
    sampled from the model (`probes.probing_set`) and not drawn from the data.

    Attributes:
        chooses: "order": one score for each of O orders. "demonstrations": (Q, W) scores, a choice for every query.
        place: "module:function" in this package: from the fields that it needs, in the order of `Need`, to scores.
        tiebreak: the same for the scores that decide between equals; None leaves them to the seed.
        with_prior: the criterion that compares with a prior given, where this one compares with the uniform one.
        shared_set: whether all queries must share one set of demonstrations.
        judged: whether it can do without labels, by judged answers.
        members: the criteria whose mean rank it is, for one that joins several.
    """

    needs: frozenset[Need]
    chooses: Literal["order", "demonstrations"] = "order"
    place: str = ""
    tiebreak: str | None = None
    with_prior: str | None = None
    shared_set: bool = True
    judged: bool = False
    members: tuple[Criterion, ...] = ()

    def scores(self, evidence: Evidence) -> Floats:
        """The scores, (O,) or (Q, W), higher is better.

        Raises:
            SparsortError: something that is needed is missing, or does not fit.
        """
        missing = sorted(need for need in self.needs - {"sampled"} if getattr(evidence, need) is None)
        if missing:
            held = [need for need in get_args(Need) if getattr(evidence, need, None) is not None]
            raise SparsortError(
                f"the criterion {self.name!r} needs {', '.join(missing)}, but the evidence holds "
                f"{', '.join(held) or 'nothing'}. Ask the model for it, or choose another criterion."
            )
        if self.members:
            from sparsort.curriculum.demos.criteria.ranking import rank_average

            return rank_average([member.scores(evidence) for member in self.members])
        return self._call(self.place, evidence)

    def choose(self, evidence: Evidence, *, seed: int = 0) -> Choice:
        """The best order, with its ties; `seed` draws among those left.

        Raises:
            SparsortError: as `scores`; the criterion chooses demonstrations for each query.
        """
        if self.chooses != "order":
            raise SparsortError(
                f"the criterion {self.name!r} chooses demonstrations for every query, not an order for all of them. "
                "Call choose_by_query instead."
            )
        from sparsort.curriculum.demos.criteria.ranking import choose

        scores = self.scores(evidence)
        return choose(scores, tiebreak=self._call(self.tiebreak, evidence) if self.tiebreak else None, seed=seed)

    def choose_by_query(self, evidence: Evidence) -> NDArray[np.int64]:
        """For every query the best of its candidates, (Q,); ties go to the earliest.

        Raises:
            SparsortError: as `scores`; the criterion chooses an order.
        """
        if self.chooses == "order":
            raise SparsortError(
                f"the criterion {self.name!r} chooses an order for all queries, not demonstrations for each. "
                "Call choose instead."
            )
        from sparsort.curriculum.demos.criteria.mdl_and_cone import first_of_best

        return first_of_best(self.scores(evidence))

    def _call(self, place: str, evidence: Evidence) -> Floats:
        values = [evidence.argument(name) for name in get_args(Need) if name in self.needs - {"sampled"}]
        options = {"denser_is_higher": evidence.denser_higher()} if self.needs & _METRIC_AXES.keys() else {}
        scores: Floats = load(place, __package__ or "")(*values, **options)
        return scores


def criterion(name: str) -> Criterion:
    """The criterion of a name, or of several joined by "+": the mean of their ranks, "density+locale".

    Raises:
        SparsortError: an unknown name, or a sum with a criterion that chooses demonstrations.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    members = [CRITERIA.check(part) for part in parts_of(name)]
    if any(member.chooses != "order" for member in members):
        raise SparsortError(f"{name!r} joins criteria, but only those that choose an order can be joined.")
    return Criterion(
        name="+".join(member.name for member in members),
        help="best mean rank under all of them",
        needs=frozenset[Need]().union(*(member.needs for member in members)),
        source="mean rank of " + "; ".join(member.source for member in members),
        members=tuple(members),
    )


def parts_of(name: str) -> list[str]:
    """The names that "+" joins."""
    return [part.strip() for part in name.split("+")]


_LABEL_SCORES: frozenset[Need] = frozenset({"log_p"})
_RIGHT_LABELS: frozenset[Need] = frozenset({"log_p", "gold"})
_LU, _XU, _LI, _OURS = "arXiv 2104.08786", "arXiv 2402.11447", "arXiv 2511.09700", "this library"

CRITERIA = Registry(
    "criterion",
    (
        Criterion(
            name="globale",
            help="predicted labels are most evenly spread over probes sampled from the model",
            source=_LU,
            needs=frozenset({"log_p", "sampled"}),
            place="label_criteria:globale",
        ),
        Criterion(
            name="locale",
            help="each prediction for probes sampled from the model is least certain",
            source=_LU,
            needs=frozenset({"log_p", "sampled"}),
            place="label_criteria:locale",
        ),
        Criterion(
            name="globale_unlabelled",
            help="predicted labels are most evenly spread over the queries",
            source=_LU + ", on unlabelled queries",
            needs=_LABEL_SCORES,
            place="label_criteria:globale",
        ),
        Criterion(
            name="locale_unlabelled",
            help="each prediction for the queries is least certain",
            source=_LU + ", on unlabelled queries",
            needs=_LABEL_SCORES,
            place="label_criteria:locale",
        ),
        Criterion(
            name="pdo",
            help="the mean predicted distribution is nearest in KL to uniform, or to a prior that is given",
            source=_XU,
            needs=_LABEL_SCORES,
            place="label_criteria:pdo",
            with_prior="pdo_prior",
        ),
        Criterion(
            name="pdo_prior",
            help="the mean predicted distribution is nearest in KL to the label shares of the pool",
            source=_XU,
            needs=frozenset({"log_p", "prior"}),
            place="label_criteria:pdo",
        ),
        Criterion(
            name="pdo_null",
            help="the mean predicted distribution on content-free inputs is nearest to uniform",
            source=_XU,
            needs=frozenset({"content_free"}),
            place="label_criteria:pdo",
        ),
        Criterion(
            name="best_on_dev",
            help="accuracy is best; ties go to the higher likelihood of the right labels",
            source=_LI,
            needs=_RIGHT_LABELS,
            place="label_criteria:best_on_dev",
            tiebreak="label_criteria:gold_log_likelihood",
            judged=True,
        ),
        Criterion(
            name="best_on_dev_likelihood",
            help="the right labels are most likely",
            source=_LI + ", by likelihood",
            needs=_RIGHT_LABELS,
            place="label_criteria:gold_log_likelihood",
        ),
        Criterion(
            name="density",
            help="the queries' last states are densest",
            source=_OURS,
            needs=frozenset({"features"}),
            place="density:density",
        ),
        Criterion(
            name="density_gain",
            help="the queries' last states are densest relative to the query alone",
            source=_OURS,
            needs=frozenset({"features", "bare_features"}),
            place="density:density_gain",
        ),
        Criterion(
            name="density_rank",
            help="the queries' last states have the best mean rank by density",
            source=_OURS,
            needs=frozenset({"features"}),
            place="density:density_rank",
        ),
        Criterion(
            name="mdl",
            help="the entropy of the label is least, query by query",
            source="arXiv 2212.10375",
            chooses="demonstrations",
            needs=_LABEL_SCORES,
            place="mdl_and_cone:mdl_scores",
            shared_set=False,
        ),
        Criterion(
            name="cone",
            help="the query's own text is least surprising, query by query",
            source="arXiv 2401.12087",
            chooses="demonstrations",
            needs=frozenset({"loss"}),
            place="mdl_and_cone:cone_scores",
        ),
    ),
)
