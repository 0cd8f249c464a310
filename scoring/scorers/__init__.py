"""What ranks examples by difficulty: the table of scorers.

Contract: `SCORERS` is the one place that lists them. An entry names the class, which is imported when a scorer is built:
nothing here imports torch, so that a command line can be read and refused before anything heavy is loaded. To add a scorer,
write a class with the interface of `scoring.scorers.base.Scorer`, and add an entry here and its name to `ScorerName`.
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

    `needs` names what it cannot do without: "text" (a prompt), "answer" (an answer in it) or "column" (the name of a column).
    `reads` names the settings of the scorer and of the text that it reads.

    Attributes:
        place: "module:class" of its class, in this package.
        runs_model: whether scoring runs a forward pass.
        arguments: what the class is constructed with besides its settings, where several scorers share it.
    """

    place: str
    runs_model: bool = False
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def build(self, settings: Mapping[str, Any]) -> Scorer:
        """The scorer with these settings."""
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
