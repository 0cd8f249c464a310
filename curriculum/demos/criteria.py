"""The criteria by which an order of demonstrations, or a query's demonstrations, are chosen with the model in the loop.

Contract: `CRITERIA` lists them by name with what each needs of the model and where it comes from; higher is better for
all. Whoever holds the model fills an `Evidence` and pays for it; nothing here calls a model. `Criterion.choose` breaks
ties as `choosing.choose` does and says how many there were. "a+b" names the mean rank of several.

Formulas, costs and traps stand with the functions: `label_criteria`, `density`, `per_query`.

Shapes: O candidate orders, P probe queries, L labels, F state metrics, C content-free inputs, Q queries, W candidates
of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparsort.curriculum.demos import density as states
from sparsort.curriculum.demos import label_criteria as labels
from sparsort.curriculum.demos import per_query
from sparsort.curriculum.demos.choosing import Choice, choose, rank_average
from sparsort.curriculum.demos.distributions import Floats, numbers
from sparsort.errors import SparsortError, unknown_choice
from sparsort.kernels.sparsity.names import HIGHER_IS_SPARSER

Need = Literal["log_p", "gold", "prior", "content_free", "features", "bare_features", "sampled", "loss"]


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
        denser_is_higher: its direction; by default that of the metric of this name in `HIGHER_IS_SPARSER`.
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

    def slice_of(self, values: Any, axes: tuple[str, ...], what: str) -> Floats:
        """The chosen metric of `features` or `bare_features`."""
        array = numbers(values, (*axes, "metrics"), what=what)
        if len(self.metrics) != array.shape[-1]:
            raise SparsortError(f"{what} holds {array.shape[-1]} metrics, but {len(self.metrics)} names were given.")
        if self.metric not in self.metrics:
            raise unknown_choice("metric", self.metric, self.metrics)
        chosen: Floats = array[..., list(self.metrics).index(self.metric)]
        return chosen

    def denser_higher(self) -> bool:
        """Whether a higher value of the chosen metric means a denser state."""
        if self.denser_is_higher is not None:
            return self.denser_is_higher
        if self.metric not in HIGHER_IS_SPARSER:
            raise SparsortError(
                f"whether a higher {self.metric!r} means a denser state is not known. Pass denser_is_higher=True or False."
            )
        return not HIGHER_IS_SPARSER[self.metric]


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion:
    """A criterion by name.

    Attributes:
        name: as in `CRITERIA`.
        chooses: "order": one score for each of O orders. "demonstrations": (Q, W) scores, a choice for every query.
        needs: the fields of `Evidence` that it reads; "sampled" says that the probes are to be sampled from the model
            (`probes.probing_set`) and not drawn from the data.
        source: the paper.
        fn: from evidence to scores.
        tiebreak: from evidence to the scores that decide between equals; None leaves them to the seed.
    """

    name: str
    chooses: Literal["order", "demonstrations"]
    needs: frozenset[Need]
    source: str
    fn: Callable[[Evidence], Floats]
    tiebreak: Callable[[Evidence], Floats] | None = None

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
        return self.fn(evidence)

    def choose(self, evidence: Evidence, *, seed: int = 0) -> Choice:
        """The best order, with its ties; `seed` draws among those left.

        Raises:
            SparsortError: as `scores`; the criterion chooses demonstrations for each query.
        """
        if self.chooses != "order":
            raise SparsortError(
                f"the criterion {self.name!r} chooses demonstrations for every query, not an order for all of them. "
                "Take the argmax of its scores over the candidates, as per_query does."
            )
        scores = self.scores(evidence)
        return choose(scores, tiebreak=self.tiebreak(evidence) if self.tiebreak else None, seed=seed)


def criterion(name: str) -> Criterion:
    """The criterion of a name, or of several joined by "+": the mean of their ranks, "density+locale".

    Raises:
        SparsortError: an unknown name, or a sum with a criterion that chooses demonstrations.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in CRITERIA:
            raise unknown_choice("criterion", part, CRITERIA)
    members = [CRITERIA[part] for part in parts]
    if any(member.chooses != "order" for member in members):
        raise SparsortError(f"{name!r} joins criteria, but only those that choose an order can be joined.")
    return Criterion(
        name="+".join(parts),
        chooses="order",
        needs=frozenset[Need]().union(*(member.needs for member in members)),
        source="mean rank of " + "; ".join(member.source for member in members),
        fn=lambda evidence: rank_average([member.scores(evidence) for member in members]),
    )


def _density(score: Callable[..., Floats]) -> Callable[[Evidence], Floats]:
    def scores(evidence: Evidence) -> Floats:
        features = evidence.slice_of(evidence.features, ("orders", "probes"), "features")
        return score(features, denser_is_higher=evidence.denser_higher())

    return scores


def _density_gain(evidence: Evidence) -> Floats:
    return states.density_gain(
        evidence.slice_of(evidence.features, ("orders", "probes"), "features"),
        evidence.slice_of(evidence.bare_features, ("probes",), "bare_features"),
        denser_is_higher=evidence.denser_higher(),
    )


def _order(
    name: str,
    fn: Callable[[Evidence], Floats],
    *needs: Need,
    source: str,
    tiebreak: Callable[[Evidence], Floats] | None = None,
) -> Criterion:
    return Criterion(name=name, chooses="order", needs=frozenset(needs), source=source, fn=fn, tiebreak=tiebreak)


def _globale(evidence: Evidence) -> Floats:
    return labels.globale(evidence.log_p)


def _locale(evidence: Evidence) -> Floats:
    return labels.locale(evidence.log_p)


def _likelihood(evidence: Evidence) -> Floats:
    return labels.gold_log_likelihood(evidence.log_p, evidence.gold)


_LU, _XU, _LI, _OURS = "arXiv 2104.08786", "arXiv 2402.11447", "arXiv 2511.09700", "this library"

CRITERIA: dict[str, Criterion] = {
    entry.name: entry
    for entry in (
        _order("globale", _globale, "log_p", "sampled", source=_LU),
        _order("locale", _locale, "log_p", "sampled", source=_LU),
        _order("globale_unlabelled", _globale, "log_p", source=_LU + ", on unlabelled queries"),
        _order("locale_unlabelled", _locale, "log_p", source=_LU + ", on unlabelled queries"),
        _order("pdo", lambda e: labels.pdo(e.log_p), "log_p", source=_XU),
        _order("pdo_prior", lambda e: labels.pdo(e.log_p, e.prior), "log_p", "prior", source=_XU),
        _order("pdo_null", lambda e: labels.pdo(e.content_free), "content_free", source=_XU),
        _order(
            "best_on_dev",
            lambda e: labels.best_on_dev(e.log_p, e.gold),
            "log_p",
            "gold",
            source=_LI,
            tiebreak=_likelihood,
        ),
        _order("best_on_dev_likelihood", _likelihood, "log_p", "gold", source=_LI + ", by likelihood"),
        _order("density", _density(states.density), "features", source=_OURS),
        _order("density_gain", _density_gain, "features", "bare_features", source=_OURS),
        _order("density_rank", _density(states.density_rank), "features", source=_OURS),
        Criterion(
            name="mdl",
            chooses="demonstrations",
            needs=frozenset({"log_p"}),
            source="arXiv 2212.10375",
            fn=lambda e: per_query.mdl_scores(e.log_p),
        ),
        Criterion(
            name="cone",
            chooses="demonstrations",
            needs=frozenset({"loss"}),
            source="arXiv 2401.12087",
            fn=lambda e: per_query.cone_scores(e.loss),
        ),
    )
}
