"""The criteria that choose an order of demonstrations, or the demonstrations of a query, by the predictions of the model.

Contract: `CRITERIA` lists the criteria, and a higher score is better for all of them. To add one, add an entry and its name to
`CriterionName`. This module neither imports NumPy nor runs a model: the caller runs the model and fills an `Evidence`.
`Criterion.choose` breaks ties as `ranking.choose` does, and reports their number. "a+b" is the mean rank under several criteria.

Formulas, costs and traps are documented at the functions: `label_criteria`, `density`, `mdl_and_cone`.

Shapes: O candidate orders, P probe queries, L labels, F state metrics, C content-free inputs, Q queries, W candidates of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.registry import Entry, Registry, load

# NumPy is imported when a criterion computes its scores, so that the command line lists the criteria without it.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparsort.curriculum.demos.criteria.distributions import Floats
    from sparsort.curriculum.demos.criteria.ranking import OrderRanking

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
# The fields of `Evidence`, in the order in which the functions take them, and "sampled", which is a condition on the probes.
Need = Literal["log_p", "gold", "prior", "content_free", "features", "bare_features", "sampled", "loss"]
# The fields of `Evidence` that contain all metrics of a state → the axes before the metrics.
_METRIC_AXES: dict[str, tuple[str, ...]] = {"features": ("orders", "probes"), "bare_features": ("probes",)}


# eq=False: a comparison of arrays has no single truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """The predictions of the model for one set of demonstrations. A criterion reads only the fields that it needs.

    Attributes:
        log_p: (O, P, L) scores of the labels; for "mdl" (Q, W, L).
        gold: (P,) indices of the right labels.
        prior: (L,) shares or counts of the labels.
        content_free: (O, C, L) scores of the labels on content-free inputs, uncalibrated.
        features: (O, P, F) metrics of the state from which the answer is predicted.
        bare_features: (P, F) the same without demonstrations.
        metrics: F names of metrics.
        metric: the metric that the density criteria read.
        denser_is_higher: the direction of this metric; by default that of the metric of this name in `METRICS`.
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
        """A field as an argument of a criterion's function; `features` and `bare_features` are reduced to the chosen metric."""
        value = getattr(self, name)
        if name not in _METRIC_AXES:
            return value
        from sparsort.curriculum.demos.criteria.distributions import numbers

        array = numbers(value, (*_METRIC_AXES[name], "metrics"), argument=name)
        if len(self.metrics) != array.shape[-1]:
            raise SparsortError(f"{name} holds {array.shape[-1]} metrics, but {len(self.metrics)} names were given.")
        if self.metric not in self.metrics:
            raise unknown_choice("metric", self.metric, self.metrics)
        return array[..., list(self.metrics).index(self.metric)]

    def denser_higher(self) -> bool:
        """Whether a higher value of the chosen metric means a denser state."""
        if self.denser_is_higher is not None:
            return self.denser_is_higher
        # A caller's own metric has no entry from which its direction could be read.
        if self.metric not in METRICS:
            raise SparsortError(
                f"it is not known whether a higher {self.metric!r} means a denser state. Pass denser_is_higher=True or False."
            )
        return not METRICS[self.metric].higher_is_sparser


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion(Entry):
    """A criterion. `needs` names the fields of `Evidence` that it reads. "sampled" among them means that the probes are sampled
    from the model (`ablation.run.probing`) and not drawn from the data.

    Attributes:
        chooses: "order": it gives one score to each of O orders. "demonstrations": it gives (Q, W) scores, and each query has a
            choice of its own.
        place: "module:function" in this package, which computes the scores from the needed fields, in the order of `Need`.
        tiebreak: the same for scores that break ties; None leaves ties to the seed.
        with_prior: the criterion that replaces this one if a prior is given; this one compares with the uniform prior.
        shared_set: whether all queries must share one set of demonstrations.
        judged: whether judged answers can take the place of labels.
        members: the criteria whose mean rank this one is, if it joins several.
    """

    needs: frozenset[Need]
    chooses: Literal["order", "demonstrations"] = "order"
    place: str = ""
    tiebreak: str | None = None
    with_prior: CriterionName | None = None
    shared_set: bool = True
    judged: bool = False
    members: tuple[Criterion, ...] = ()

    def scores(self, evidence: Evidence) -> Floats:
        """The scores, (O,) or (Q, W), higher is better.

        Raises:
            SparsortError: a field that is needed is missing or invalid.
        """
        missing = sorted(need for need in self.needs - {"sampled"} if getattr(evidence, need) is None)
        if missing:
            known = [need for need in get_args(Need) if getattr(evidence, need, None) is not None]
            raise SparsortError(
                f"the criterion {self.name!r} needs {', '.join(missing)}, but the evidence holds "
                f"{', '.join(known) or 'nothing'}. Compute it with the model, or choose another criterion."
            )
        # Ranks, because the scores of different criteria have no common unit.
        if self.members:
            from sparsort.curriculum.demos.criteria.ranking import rank_average

            return rank_average([member.scores(evidence) for member in self.members])
        return self._call(self.place, evidence)

    def choose(self, evidence: Evidence, *, seed: int = 0) -> OrderRanking:
        """The best order, and the number of ties. The seed decides among the orders that still tie after the tiebreak.

        Raises:
            SparsortError: as `scores`, or the criterion chooses demonstrations for each query.
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
        """For each query, the index of the best of its candidates, (Q,); ties go to the earliest.

        Raises:
            SparsortError: as `scores`, or the criterion chooses an order.
        """
        if self.chooses == "order":
            raise SparsortError(
                f"the criterion {self.name!r} chooses an order for all queries, not demonstrations for each. "
                "Call choose instead."
            )
        from sparsort.curriculum.demos.criteria.mdl_and_cone import first_of_best

        return first_of_best(self.scores(evidence))

    def _call(self, place: str, evidence: Evidence) -> Floats:
        # Arguments are passed by position, in the order of `Need`, since a set has no order.
        values = [evidence.argument(name) for name in get_args(Need) if name in self.needs - {"sampled"}]
        options = {"denser_is_higher": evidence.denser_higher()} if self.needs & _METRIC_AXES.keys() else {}
        scores: Floats = load(place, __package__ or "")(*values, **options)
        return scores


def criterion(name: str) -> Criterion:
    """The criterion with this name, or the mean rank under several, such as "density+locale".

    Raises:
        SparsortError: an unknown name, or a sum with a criterion that chooses demonstrations.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    # A name without "+" that is not in the table is reported here too.
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
    """The names that are joined by "+"."""
    return [part.strip() for part in name.split("+")]


_LABEL_SCORES: frozenset[Need] = frozenset({"log_p"})
_RIGHT_LABELS: frozenset[Need] = frozenset({"log_p", "gold"})
_LU, _XU, _LI, _OURS = "arXiv 2104.08786", "arXiv 2402.11447", "arXiv 2511.09700", "this library"

CRITERIA = Registry(
    "criterion",
    (
        # Entropies of predicted labels, on probes that the model writes, or on the queries.
        Criterion(
            name="globale",
            help="the predicted labels are most evenly distributed over probes sampled from the model",
            source=_LU,
            needs=frozenset({"log_p", "sampled"}),
            place="label_criteria:globale",
        ),
        Criterion(
            name="locale",
            help="the predictions for probes sampled from the model are least certain",
            source=_LU,
            needs=frozenset({"log_p", "sampled"}),
            place="label_criteria:locale",
        ),
        Criterion(
            name="globale_unlabelled",
            help="the predicted labels are most evenly distributed over the queries",
            source=_LU + ", on unlabelled queries",
            needs=_LABEL_SCORES,
            place="label_criteria:globale",
        ),
        Criterion(
            name="locale_unlabelled",
            help="the predictions for the queries are least certain",
            source=_LU + ", on unlabelled queries",
            needs=_LABEL_SCORES,
            place="label_criteria:locale",
        ),
        # Divergences of the mean prediction from a prior.
        Criterion(
            name="pdo",
            help="the mean predicted distribution is nearest in KL to the uniform one, or to a given prior",
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
            help="the mean predicted distribution on content-free inputs is nearest to the uniform one",
            source=_XU,
            needs=frozenset({"content_free"}),
            place="label_criteria:pdo",
        ),
        # Labelled development rows.
        Criterion(
            name="best_on_dev",
            help="the accuracy is highest; ties go to the higher likelihood of the right labels",
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
        # Hidden states: neither labels nor predictions are read.
        Criterion(
            name="density",
            help="the queries' last states are densest",
            source=_OURS,
            needs=frozenset({"features"}),
            place="density:density",
        ),
        Criterion(
            name="density_gain",
            help="the queries' last states are densest relative to those without demonstrations",
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
        # Demonstrations for each query, among candidate sets.
        Criterion(
            name="mdl",
            help="the entropy of the predicted label is lowest, for each query separately",
            source="arXiv 2212.10375",
            chooses="demonstrations",
            needs=_LABEL_SCORES,
            place="mdl_and_cone:mdl_scores",
            shared_set=False,
        ),
        Criterion(
            name="cone",
            help="the loss on the query's own text is lowest, for each query separately",
            source="arXiv 2401.12087",
            chooses="demonstrations",
            needs=frozenset({"loss"}),
            place="mdl_and_cone:cone_scores",
        ),
    ),
)
