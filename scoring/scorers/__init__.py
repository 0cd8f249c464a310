"""The table of scorers, which rank examples by difficulty.

Contract: `SCORERS` is the only list of scorers. An entry names its class, which is imported when a scorer is built. Nothing here
imports torch, so a command line can be checked before anything heavy is loaded. To add a scorer, write a class with the
interface of `scoring.scorers.base.Scorer`, and add an entry here and its name to `ScorerName`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sparsort.registry import Entry, Registry, load

if TYPE_CHECKING:
    from sparsort.scoring.scorers.base import Scorer

ScorerName = Literal["sparsity", "answer_loss", "prompt_loss", "entropy", "length", "compression", "random", "column"]

_TOKENIZER = frozenset({"model", "revision", "trust_remote_code", "system", "chat"})
_MODEL = _TOKENIZER | {"dtype", "device", "token_budget", "truncation", "max_length"}
_TEXT = frozenset({"text"})


@dataclass(frozen=True, kw_only=True)
class ScorerEntry(Entry):
    """One scorer.

    `needs` names the inputs that it requires: "text" (a prompt), "answer" (an answer in the prompt) or "column" (the name of a
    column). `reads` names the settings that it reads, both its own and those of the text.

    Attributes:
        place: "module:class" of its class, in this package.
        runs_model: whether scoring runs a forward pass.
        arguments: fixed arguments of the class, where several entries share one class.
    """

    place: str
    runs_model: bool = False
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def build(self, settings: Mapping[str, Any]) -> Scorer:
        """Construct the scorer with these settings."""
        scorer: Scorer = load(self.place, "sparsort.scoring.scorers")(**settings, **self.arguments)
        return scorer


SCORERS = Registry(
    "scorer",
    (
        ScorerEntry(
            name="sparsity",
            help="how sparse the model's hidden state is: the sparser, the harder",
            source="arXiv 2603.03415",
            place="sparsity:SparsityScorer",
            needs=_TEXT,
            reads=_MODEL | {"answer", "calibration", "site", "pooling", "metric", "outliers", "l0_threshold"},
            runs_model=True,
        ),
        ScorerEntry(
            name="answer_loss",
            help="mean negative log-likelihood of the answer's tokens, in nats per token",
            source="baseline",
            place="losses:LossScorer",
            needs=_TEXT | {"answer"},
            reads=_MODEL | {"answer"},
            runs_model=True,
            arguments=MappingProxyType({"on": "answer"}),
        ),
        ScorerEntry(
            name="prompt_loss",
            help="mean negative log-likelihood of the prompt's tokens, in nats per token",
            source="baseline",
            place="losses:LossScorer",
            needs=_TEXT,
            reads=_MODEL,
            runs_model=True,
            arguments=MappingProxyType({"on": "prompt"}),
        ),
        ScorerEntry(
            name="entropy",
            help="entropy of the model's prediction of the next token, in nats",
            source="baseline",
            place="losses:EntropyScorer",
            needs=_TEXT,
            reads=_MODEL | {"answer"},
            runs_model=True,
        ),
        ScorerEntry(
            name="length",
            help="length of the text, in tokens or characters",
            source="confound",
            place="baselines:LengthScorer",
            needs=_TEXT,
            reads=_TOKENIZER | {"answer", "unit"},
        ),
        ScorerEntry(
            name="compression",
            help="compressed bytes over bytes (zlib, level 9)",
            source="baseline",
            place="baselines:CompressionScorer",
            needs=_TEXT,
            reads=frozenset({"answer"}),
        ),
        ScorerEntry(
            name="random",
            help="a uniform number from the seed and the id",
            source="control",
            place="baselines:RandomScorer",
            reads=frozenset({"seed"}),
        ),
        ScorerEntry(
            name="column",
            help="a number that the data already holds",
            source="your data",
            place="baselines:ColumnScorer",
            needs=frozenset({"column"}),
            reads=frozenset({"column", "descending"}),
        ),
    ),
)
MODEL_SCORERS = SCORERS.names(lambda entry: entry.runs_model)
