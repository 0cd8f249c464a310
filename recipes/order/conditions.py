"""The conditions under which each option of `order_file` and `sparsort order` has an effect.

Contract: conditions depend on the options alone; see `sparsort.conditions`. A value that is not a valid choice counts as one
that reads every option, so that the misspelt name is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from sparsort.conditions import Table, Values, When, always, among, excludes, needs, under
from sparsort.curriculum.demos.order import READ_BY as ORDERS_READ_BY
from sparsort.curriculum.demos.order import ranks_by, reads_order
from sparsort.curriculum.demos.prompt import READ_BY as PROMPT_READ_BY
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR, SELECTORS, SelectorEntry
from sparsort.recipes.score.config import READ_BY as SCORER_READ_BY
from sparsort.scoring.scorers import MODEL_SCORERS, SCORERS

NO_CONVERSATION = excludes("messages", "{messages} holds whole conversations, with their own turns")
SYSTEM = needs("chat", "a plain prompt has no system turn", chat=True)
# `unit` is an argument of Python alone.
_SCORER = {name: own for name, own in SCORER_READ_BY.items() if name != "unit"}
_READ_NOW = among("scorer", MODEL_SCORERS, of=SCORERS)


def _is(values: Values, name: str, choices: Collection[str], known: Collection[str]) -> bool:
    """Whether the value of an option is among `choices`, or is not a valid choice."""
    return values[name] in choices or values[name] not in known


def _selects(values: Values, holds: Callable[[SelectorEntry], bool]) -> bool:
    """Whether `holds` is true for the selector's entry; true for a value that is not a selector."""
    return values["select"] not in SELECTORS or holds(SELECTORS[values["select"]])


def _ranks(values: Values) -> bool:
    return ranks_by("difficulty")(values) or _selects(values, lambda entry: "scores" in entry.needs)


def _scores_now(values: Values) -> bool:
    return _ranks(values) and (
        values["scores"] is None or _selects(values, lambda entry: "query_difficulty" in entry.needs)
    )


def _embeds(values: Values) -> bool:
    return ranks_by("similarity")(values) or _selects(values, lambda entry: "embeddings" in entry.needs)


def _runs_model(values: Values) -> bool:
    scored = _scores_now(values) and _is(values, "scorer", MODEL_SCORERS, SCORERS)
    return scored or (_embeds(values) and values["embedder"] is None)


def _reads_model(values: Values) -> bool:
    counts = values["max_tokens"] is not None or values["chat"] or values["messages"] is not None
    return _runs_model(values) or counts or (_scores_now(values) and values["scorer"] in SCORERS.reading("model"))


def _draws(values: Values) -> bool:
    drawn = values["k"] is not None and _selects(values, lambda entry: entry.is_seeded)
    shuffled = reads_order(lambda entry: entry.is_seeded)(values)
    return drawn or shuffled or (_scores_now(values) and values["scorer"] in SCORERS.reading("seed"))


_RANKED = When(holds=_ranks, why="no score is read here, neither to select nor to order")
_NOT_SCORED_YET = When(holds=_scores_now, why="{scores} has the scores")
_OWN_PROMPT = When(
    holds=lambda values: values["calibration"] is None or values["prompt"] is not None,
    why="{calibration} has its own prompt",
)
NEEDS_MODEL = (When(holds=_runs_model, why="nothing here runs a model"),)
_NEEDS_TOKENIZER = (When(holds=_reads_model, why="nothing here reads a model"),)

READ_BY: Table = {
    **always("prompt", "answer", "messages", "id_column", "columns", "k", "ids", "order", "max_tokens", "allow_leaks"),
    **under(_RANKED, under(_NOT_SCORED_YET, _SCORER | dict.fromkeys(("truncation", "max_length"), (_READ_NOW,)))),
    "scores": (_RANKED,),
    "system": (NO_CONVERSATION, _OWN_PROMPT, SYSTEM),
    "chat": (NO_CONVERSATION, _OWN_PROMPT),
    "select": (
        When(
            holds=lambda values: values["ids"] is None or _selects(values, lambda entry: entry.names_rows),
            why="{ids} names the demonstrations",
        ),
        When(
            holds=lambda values: values["k"] is not None or values["select"] != DEFAULT_SELECTOR,
            why="every row is shown unless the number of demonstrations is given",
            instead={"k": 4},
        ),
    ),
    "label": (among("select", SELECTORS.needing("label"), of=SELECTORS),),
    "drop": PROMPT_READ_BY["drop"],
    "allow_zero_shot": PROMPT_READ_BY["allow_zero_shot"],
    "separator": PROMPT_READ_BY["separator"],
    "missing": ORDERS_READ_BY["missing"],
    "embedder": (When(holds=_embeds, why="nothing here reads embeddings"),),
    "seed": (When(holds=_draws, why="nothing here is drawn at random"),),
    "model": _NEEDS_TOKENIZER,
    "revision": _NEEDS_TOKENIZER,
    "trust_remote_code": _NEEDS_TOKENIZER,
    "dtype": NEEDS_MODEL,
    "device": NEEDS_MODEL,
    "token_budget": NEEDS_MODEL,
}
