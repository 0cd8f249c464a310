"""Select, order and assemble the demonstrations of a prompt. The recipe for `sparsort order`.

Contract: the model is loaded at most once, and only for scores or embeddings. The demonstrations are scored with the same prompt
that they will appear in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsort.conditions import changed, refuse_unread
from sparsort.curriculum.demos.demonstrator import Demonstration, Demonstrator
from sparsort.curriculum.demos.export import ExportFormat, PinnedDemos, check_export, write_pinned
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.order import default_order, order_entry, order_indices
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.pool.rows import listed
from sparsort.curriculum.demos.prompt import PromptForm
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR
from sparsort.errors import SparsortError
from sparsort.options import values_of
from sparsort.recipes.order.conditions import READ_BY
from sparsort.recipes.order.config import OrderConfig
from sparsort.recipes.order.demo_text import DemoText
from sparsort.recipes.score.config import ScorerConfig
from sparsort.scoring.data.rows import Row
from sparsort.scoring.prompts.prompt import check_truncation
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.store.scores import Scores
from sparsort.terminal.printing import one_line
from sparsort.values import text_if_any

if TYPE_CHECKING:
    from sparsort.scoring.model.backbone import Backbone
    from sparsort.scoring.store.row_cache import RowCache

# A file with more rows than this is a pool to select from, and not the demonstrations themselves.
MOST_DEMOS = 64
_EXCERPT_CHARS = 80


@dataclass(frozen=True, kw_only=True)
class OrderResult:
    """The prompt, and how it was made.

    `cache` counts the rows that came from the cache and those that the model read: `{"from_cache": …, "read": …}`; it is None
    without a cache.
    """

    prompt: str
    messages: list[dict[str, str]] | None
    order: str
    demonstrations: list[dict[str, Any]]
    n_tokens: int | None
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] | None = None
    cache: dict[str, int] | None = None

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return dict(vars(self))


def order_file(
    file: Any,
    *,
    query: str | Mapping[str, Any],
    config: OrderConfig,
    scorer: ScorerConfig,
    scores: str | Path | None = None,
    cache: RowCache | None = None,
    export: str | Path | None = None,
    export_format: ExportFormat | None = None,
) -> OrderResult:
    """Read demonstrations from `file`, select and order them for `query`, and assemble the prompt.

    Args:
        file: the demonstrations or the pool, a path or other data that `open_rows` reads.
        query: a row, as a mapping or a JSON object, or the text of the prompt's only field. With `messages`, also a JSON array
            of turns, or the text of a user's turn.
        config: selection, order and assembly.
        scorer: the scorer of the demonstrations if `scores` is None.
        scores: earlier scores of these rows.
        cache: a store of what the model computed for these rows before, which is extended; None to read every row and to write
            nothing.
        export: a file for the demonstrations in this order, which another program reads; see `export_demonstrations`.
        export_format: its format; None for the one that the file's name ends in.

    Raises:
        SparsortError: the input is wrong; the message says how to correct it.
    """
    _refuse_unread(config, scorer, scores)
    scorer = scorer.calibrated()
    scorer.check_names()
    table = Scores.load(scores) if scores is not None else None
    config = _resolved(config, scorer, table.kind if table is not None else scorer.kind)
    demonstrator = _demonstrator(config, scorer, table)
    source = config.data.open(file)
    rows = list(source.rows())
    text = DemoText.of(source, config.prompt)
    if (calibration := scorer.loaded_calibration) is not None:
        definition = calibration.definition
        definition.refuse_other_prompt(text.read(answer=definition.candidate.reads_answer))
    query_fields = text.parse_query(query, [row.fields for row in rows])
    if export is not None:
        _refuse_by_query(config, demonstrator)
        check_export(export, export_format, text.kind, text.prompt)
    check_truncation(config.prompt.truncation)
    scorer.check_model(max_length=config.prompt.max_length)
    model = _Model(rows, text, config, scorer, table, cache)
    if "label" in demonstrator.selector_entry.needs:
        source.check(lambda fields, where: text_if_any(fields, config.label or "label", where=where))
    _check_count(config, len(rows))
    known = model.known(query_fields)
    selection = demonstrator.choose(known)
    source.check(lambda fields, where: text.whole(fields, where=where), [rows[at].position for at in selection.indices])
    _check_scored(model, known, selection.indices)
    tokenizer = model.tokenizer() if config.max_tokens is not None or text.chat else None
    form = _form(config, text)
    shown = replace(demonstrator, form=form).demonstrate(known, selection, tokenizer=tokenizer)
    if export is not None:
        write_pinned(PinnedDemos(rows=shown.rows, form=form, provenance=model.how_ordered()), export, export_format)
    return _result(model, known, shown)


def _demonstrator(config: OrderConfig, scorer: ScorerConfig, table: Scores | None) -> Demonstrator:
    """The selection and the order, whose names are checked here, before a model is loaded."""
    demonstrator = Demonstrator(
        selector=config.select,
        order=config.order,
        k=config.k,
        seed=config.seed,
        ids=config.ids,
        missing=config.missing,
        allow_leaks=config.allow_leaks,
        own_similarity=True,
    )
    if config.k is None and config.ids is None and demonstrator.selector_entry.name != DEFAULT_SELECTOR:
        raise SparsortError(
            f"selection by {config.select!r} needs the number of demonstrations k (-k) or, for 'ids', the ids (--ids)."
        )
    if table is None:
        # This call orders nothing, but it checks that the order accepts the scorer's kind of score.
        order_indices(
            str(config.order), 0, difficulty=[], kind=scorer.kind, similarity=[], lengths=[], missing=config.missing
        )
    return demonstrator


def _refuse_by_query(config: OrderConfig, demonstrator: Demonstrator) -> None:
    """Refuse to export demonstrations that another query would not get, or not in this order."""
    order = str(config.order)
    if demonstrator.selector_entry.looks_at_query:
        what = f"selection by {demonstrator.selector_entry.name!r}"
    elif order_entry(order).ranks_by == "similarity":
        what = f"the order {order!r}"
    elif config.max_tokens is not None:
        what = "the token budget (--max-tokens)"
    else:
        return
    raise SparsortError(
        f"{what} depends on the query, and an export shows the same demonstrations to every query. Export without it, or use the "
        "adapters for lm-evaluation-harness and LangChain, which choose for each query."
    )


def _check_count(config: OrderConfig, count: int) -> None:
    if config.k is None and config.ids is None and count > MOST_DEMOS:
        raise SparsortError(
            f"the file has {count} rows; pass k (--shots) to select that many of them, and select (--select) for the method."
        )


def _check_scored(model: _Model, known: Known, indices: Sequence[int]) -> None:
    """Refuse demonstrations that have no score because they exceed the limit in tokens, with the options that help."""
    config = model.config
    if order_entry(str(config.order)).ranks_by != "difficulty" or config.missing != "error" or known.difficulty is None:
        return
    unscored = np.flatnonzero(np.isnan(known.difficulty.at(indices)))
    too_long = [indices[place] for place in unscored.tolist() if indices[place] in model.too_long]
    if too_long:
        ids = listed([repr(model.rows[at].id) for at in too_long], most=10)
        raise SparsortError(
            f"the order {config.order!r} needs a score for each demonstration, but {len(unscored)} of {len(indices)} have NaN, "
            f"because their texts are longer than the limit in tokens: {ids}. Cut texts with truncation='left' (--truncation "
            "left), raise max_length (--max-length), or place such demonstrations with missing='first' (--missing first)."
        )


def _result(model: _Model, known: Known, shown: Demonstration) -> OrderResult:
    order = str(model.config.order)
    prompt = shown.prompt
    is_ranked = order_entry(order).ranks_by == "difficulty"
    difficulty = known.difficulty.at(shown.indices) if known.difficulty is not None and is_ranked else None
    demonstrations = [
        {
            "id": model.rows[at].id,
            "difficulty": None if difficulty is None or math.isnan(difficulty[place]) else float(difficulty[place]),
            "kept": place in prompt.kept,
            "excerpt": one_line(model.text_of(at), _EXCERPT_CHARS),
        }
        for place, at in enumerate(shown.indices)
    ]
    return OrderResult(
        prompt=prompt.text,
        messages=prompt.messages,
        order=order,
        demonstrations=demonstrations,
        n_tokens=prompt.n_tokens,
        notes=[*model.notes, *shown.notes],
        provenance=model.provenance,
        cache=model.cache.summary() if model.cache is not None else None,
    )


def _form(config: OrderConfig, text: DemoText) -> PromptForm:
    return PromptForm(
        prompt=text.prompt,
        answer=text.answer,
        messages=text.messages,
        system=text.system,
        separator=config.separator,
        chat=text.chat,
        max_tokens=config.max_tokens,
        drop=config.drop,
        allow_zero_shot=config.allow_zero_shot,
    )


class _Model:
    """The model of one call, and the values that it computes for rows and the query; it is loaded when it is first needed."""

    def __init__(
        self,
        rows: Sequence[Row],
        text: DemoText,
        config: OrderConfig,
        scorer: ScorerConfig,
        table: Scores | None,
        cache: RowCache | None,
    ) -> None:
        self.cache = cache
        self.rows, self.text, self.config, self.scorer = rows, text, config, scorer
        self._table = table
        self._scorer: Any = None
        self._table_fit: Scores | None = None
        self._loaded: Any = None
        self._tokenizer: Any = None
        self._backbone: Any = None
        self._read = text.read()
        # Positions of rows that have no score because their texts are longer than the limit.
        self.too_long: set[int] = set()
        self.notes: list[str] = []
        # None if they cannot be counted.
        self._tokens_read: int | None = 0 if table is None else _tokens(table)
        self.provenance: dict[str, Any] | None = table.provenance if table is not None else None
        scored_prompt = table.provenance.get("prompt") if table is not None else None
        if scored_prompt is not None and scored_prompt.get("turns") != [list(turn) for turn in self._read.turns]:
            self.notes.append(f"the scores are of another prompt: {scored_prompt['turns'][-1][1]!r}.")

    def known(self, query: Mapping[str, Any]) -> Known:
        """What is known about the rows and the query, each part computed when it is first read."""
        rows, count = self.rows, len(self.rows)
        ids, label = [row.id for row in rows], self.config.label
        return Known(
            DemoPool([row.fields for row in rows], ids=ids, label=label, **self.text.compared_by()),
            query,
            difficulty=RowNumbers(count, self._difficulty),
            kind=self._table.kind if self._table is not None else self.scorer.kind,
            embeddings=RowNumbers(count, lambda at: self._embed([rows[i].fields for i in at])),
            query_difficulty=lambda: self._query_difficulty(query),
            query_embedding=lambda: self._embed([query])[0],
            lengths=RowNumbers(count, lambda at: [len(self.text_of(i)) for i in at]),
        )

    def how_ordered(self) -> dict[str, Any]:
        """How the demonstrations were selected and ordered, for an export."""
        config, environment = self.config, (self.provenance or {}).get("environment", {})
        reads_scores = self.provenance is not None
        return {
            "order": config.order,
            "select": None if config.k is None and config.ids is None else config.select,
            "seed": config.seed,
            "scorer": self.provenance.get("scorer") if self.provenance is not None else None,
            "metric": self.provenance.get("metric") if self.provenance is not None else None,
            "model": environment.get("model") if reads_scores else None,
            "tokens_read": self._tokens_read,
        }

    def text_of(self, position: int) -> str:
        """A demonstration as it will appear in the prompt, without chat markers."""
        row = self.rows[position]
        return self.text.whole(row.fields, where=row.name)

    def _difficulty(self, positions: Sequence[int]) -> Any:
        """(N,) difficulty of some rows, from earlier scores or scored now."""
        fields = [self.rows[position].fields for position in positions]
        if self._table is not None:
            return self._table.difficulty_of(fields)
        scores = self._score(fields)
        status = zip(positions, scores.column("status"), strict=True)
        self.too_long |= {position for position, name in status if name == "too_long"}
        return np.asarray(scores.difficulty, dtype=np.float64)

    def _query_difficulty(self, query: Mapping[str, Any]) -> float:
        """The difficulty of the query by the same score."""
        if self.scorer.needs_answer:
            raise SparsortError(
                "this score reads the answer, which a query does not have. Match by a score of the prompt alone."
            )
        return float(self._score([query]).difficulty[0])

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.scorer.model.load_tokenizer()
        return self._tokenizer

    def _model(self) -> Any:
        if self._loaded is None:
            from sparsort.scoring.prompts.chat_templates import need_chat_template

            if self.text.chat:
                need_chat_template(self.tokenizer())
            self._loaded = replace(self.scorer.model, tokenizer=self.tokenizer()).load()
        return self._loaded

    def _score(self, fields: Sequence[Mapping[str, Any]]) -> Scores:
        spec = self.config.prompt
        read = PromptSpec(
            self.text.read(answer=self.scorer.needs_answer), truncation=spec.truncation, max_length=spec.max_length
        )
        options: dict[str, Any] = {}
        if self._scorer is None:
            self._scorer = self.scorer.load(self._model() if self.scorer.runs_model else None)
            if self.scorer.runs_model:
                self._scorer.backbone.mark_as_own()
        if self.scorer.runs_model:
            options["cache"] = self._cache_for(self._scorer.backbone)
        is_fitted = self.scorer.outliers != "none" and self.scorer.calibration is None
        if is_fitted and self._table is None and self._table_fit is None:
            # The outlier rule is fitted once, on the whole pool: a few demonstrations or the query alone do not show which
            # dimensions are wide.
            self._table_fit = self._scorer.score([row.fields for row in self.rows], read, **options)
        scores: Scores = self._scorer.score(list(fields), read, like=self._table or self._table_fit, **options)
        self.provenance = scores.provenance
        if self._tokens_read is not None:
            self._tokens_read += _tokens(scores)
        return scores

    def _embed(self, fields: Sequence[Mapping[str, Any]]) -> Any:
        if self.config.embedder is not None:
            from sparsort.curriculum.demos.pool.similarity import sentence_embeddings

            texts = [self.text.question(row, where=f"row {number}") for number, row in enumerate(fields)]
            return sentence_embeddings(texts, self.config.embedder)
        from sparsort.scoring.model.backbone import Backbone
        from sparsort.scoring.scorers.sentence_vectors import embed_rows

        self._tokens_read = None
        if self._backbone is None:
            self._backbone = Backbone(self._model(), token_budget=self.scorer.model.token_budget)
            self._backbone.mark_as_own()
        return embed_rows(self._backbone, fields, self._read, cache=self._cache_for(self._backbone))

    def _cache_for(self, backbone: Backbone) -> RowCache | None:
        """The cache; None, with a note, if values of this model cannot be kept."""
        from sparsort.scoring.store.row_cache import obstacle

        if self.cache is not None and (why := obstacle(backbone)) is not None:
            self.notes.append(f"nothing was kept in the cache: {why}.")
            self.cache = None
        return self.cache


def _tokens(scores: Scores) -> int:
    """The tokens that a model read for these scores."""
    return int(np.maximum(scores.column("n_tokens"), 0).sum())


def _refuse_unread(config: OrderConfig, scorer: ScorerConfig, scores: str | Path | None) -> None:
    """Refuse a setting without an effect. A seed, and a scorer next to scores, are accepted even if they are not read."""
    values = {name: value for part in (scorer, config) for name, value, _ in values_of(part)} | {"scores": scores}
    refuse_unread(READ_BY, values, [name for name in changed(config) if name != "seed"])


def _resolved(config: OrderConfig, scorer: ScorerConfig, kind: str) -> OrderConfig:
    """The configuration with its default order, and with the prompt of the calibration if it has no other prompt.

    Raises:
        SparsortError: the calibrated prompt cannot contain demonstrations.
    """
    config = replace(config, order=config.order or default_order(kind))
    calibration = scorer.loaded_calibration
    if calibration is None or config.prompt.template is not None or config.prompt.messages is not None:
        return config
    definition = calibration.definition
    if (column := definition.prompt.messages) is not None:
        return replace(config, prompt=replace(config.prompt, messages=column))
    roles = [role for role, _ in definition.turns]
    if roles not in (["text"], ["user"], ["system", "user"]):
        raise SparsortError(
            f"the calibrated prompt has the turns {', '.join(roles)}, and demonstrations are put into a plain prompt or into one "
            "user turn. Calibrate such a prompt."
        )
    system = definition.turns[0][1] if roles[0] == "system" else None
    template, chat = definition.turns[-1][1], roles != ["text"]
    return replace(config, prompt=replace(config.prompt, template=template, system=system, chat=chat))
