"""How a layer chooses the blocks that it attends to: the table of selectors, and a file for each.

Contract: `SELECTORS` is the one place that lists them. An entry names the class, which is imported when a layer is built:
nothing here imports torch, so that a configuration can be read and refused before anything heavy is loaded. To add a
selector, write a file with a subclass of `base.Selector`, and add an entry here and its name to `SelectorKind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsort.registry import Entry, Registry, load

if TYPE_CHECKING:
    from sparsort.attention.selectors.base import Selector

SelectorKind = Literal["index_branch", "moba", "seer", "nsa", "lm_trained", "window", "sink_window", "random", "oracle"]
Teacher = Literal["nothing", "alignment_loss", "lm_loss"]
_SHARES = frozenset({"threshold", "top_p"})
_INDEX = frozenset({"index_dim", "index_norm"})


@dataclass(frozen=True, kw_only=True)
class SelectorEntry(Entry):
    """One selector.

    Attributes:
        place: "module:class" of its class, in this package.
        learns_by: what its weights learn by; "nothing" for a selector without weights.
        shaped_by_blocks: whether the sizes of its weights depend on the block size.
    """

    place: str
    learns_by: Teacher
    shaped_by_blocks: bool = False

    @property
    def has_weights(self) -> bool:
        return self.learns_by != "nothing"

    def load(self) -> type[Selector]:
        """The selector's class."""
        cls: type[Selector] = load(self.place, __name__)
        return cls


SELECTORS = Registry(
    "selector",
    (
        SelectorEntry(
            name="index_branch",
            help="highest index score in the block: one small query per group, one key for all groups",
            source="MSA, arXiv 2606.13392",
            place="index_branch:IndexBranch",
            reads=_SHARES | _INDEX | {"alignment_weight"},
            learns_by="alignment_loss",
        ),
        SelectorEntry(
            name="moba",
            help="queries · mean key of the block",
            source="MoBA, arXiv 2502.13189",
            place="moba:MeanKeyGate",
            reads=_SHARES,
            learns_by="nothing",
        ),
        SelectorEntry(
            name="seer",
            help="gated queries · gated max, min and mean of the block's keys",
            source="SeerAttention, arXiv 2410.13276, 2506.08889",
            place="seer:PooledGate",
            reads=_SHARES | {"index_dim", "alignment_weight"},
            learns_by="alignment_loss",
        ),
        SelectorEntry(
            name="nsa",
            help="attention over compressed keys, which also joins the output",
            source="NSA, arXiv 2502.11089",
            place="nsa:CompressedBranch",
            reads=_SHARES,
            learns_by="lm_loss",
            shaped_by_blocks=True,
        ),
        SelectorEntry(
            name="lm_trained",
            help="the index branch's score, as a straight-through bias on the logits",
            source="after SAS, arXiv 2609.13141",
            place="lm_trained:LMTrainedBranch",
            reads=_SHARES | _INDEX,
            learns_by="lm_loss",
        ),
        SelectorEntry(
            name="window",
            help="the last blocks",
            source="sliding-window attention",
            place="fixed:Window",
            learns_by="nothing",
        ),
        SelectorEntry(
            name="sink_window",
            help="the first block and the last ones",
            source="attention sinks, arXiv 2309.17453",
            place="fixed:SinkWindow",
            learns_by="nothing",
        ),
        SelectorEntry(
            name="random",
            help="the query's own block and others at random",
            source="baseline",
            place="fixed:RandomBlocks",
            learns_by="nothing",
        ),
        SelectorEntry(
            name="oracle",
            help="the blocks with most dense attention",
            source="upper bound",
            place="fixed:Oracle",
            reads=_SHARES,
            learns_by="nothing",
        ),
    ),
)
