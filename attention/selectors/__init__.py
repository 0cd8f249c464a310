"""The table of selectors, which choose the blocks that a layer attends to. Each selector has its own file.

Contract: `SELECTORS` is the only list of selectors. An entry names its class, which is imported when a layer is built. This
module does not import torch, so a configuration can be read and refused before anything heavy is loaded. To add a selector,
write a file with a subclass of `base.Selector`, add an entry here, and add its name to `SelectorKind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsort.registry import Entry, Registry, load

if TYPE_CHECKING:
    from sparsort.attention.selectors.base import Selector

SelectorKind = Literal["index_branch", "moba", "seer", "nsa", "lm_trained", "window", "sink_window", "random", "oracle"]
Teacher = Literal["nothing", "alignment_loss", "lm_loss"]
# The settings of budgets by softmax shares, which only selectors with block scores read.
_SHARES = frozenset({"threshold", "top_p"})
_INDEX = frozenset({"index_dim", "index_norm"})


@dataclass(frozen=True, kw_only=True)
class AttentionSelectorEntry(Entry):
    """One selector.

    Attributes:
        place: "module:class", the selector's class relative to this package.
        learns_by: the loss that trains its weights; "nothing" for a selector without weights.
        shaped_by_blocks: whether the shapes of its weights depend on the block size.
    """

    place: str
    learns_by: Teacher
    shaped_by_blocks: bool = False

    @property
    def has_weights(self) -> bool:
        return self.learns_by != "nothing"

    def load(self) -> type[Selector]:
        """Import and return the selector's class."""
        cls: type[Selector] = load(self.place, __name__)
        return cls


SELECTORS = Registry(
    "selector",
    (
        AttentionSelectorEntry(
            name="index_branch",
            help="highest index score in the block: one small query per group, one key for all groups",
            source="MSA, arXiv 2606.13392",
            place="index_branch:IndexBranch",
            reads=_SHARES | _INDEX | {"alignment_weight"},
            learns_by="alignment_loss",
        ),
        AttentionSelectorEntry(
            name="moba",
            help="queries · mean key of the block",
            source="MoBA, arXiv 2502.13189",
            place="moba:MeanKeyGate",
            reads=_SHARES,
            learns_by="nothing",
        ),
        AttentionSelectorEntry(
            name="seer",
            help="gated queries · gated max, min and mean of the block's keys",
            source="SeerAttention, arXiv 2410.13276, 2506.08889",
            place="seer:PooledGate",
            reads=_SHARES | {"index_dim", "alignment_weight"},
            learns_by="alignment_loss",
        ),
        AttentionSelectorEntry(
            name="nsa",
            help="attention over compressed keys, which also joins the output",
            source="NSA, arXiv 2502.11089",
            place="nsa:CompressedBranch",
            reads=_SHARES,
            learns_by="lm_loss",
            shaped_by_blocks=True,
        ),
        AttentionSelectorEntry(
            name="lm_trained",
            help="the index branch's score, as a straight-through bias on the logits",
            source="after SAS, arXiv 2609.13141",
            place="lm_trained:LMTrainedBranch",
            reads=_SHARES | _INDEX,
            learns_by="lm_loss",
        ),
        AttentionSelectorEntry(
            name="window",
            help="the last blocks",
            source="sliding-window attention",
            place="fixed:Window",
            learns_by="nothing",
        ),
        AttentionSelectorEntry(
            name="sink_window",
            help="the first block and the last ones",
            source="attention sinks, arXiv 2309.17453",
            place="fixed:SinkWindow",
            learns_by="nothing",
        ),
        AttentionSelectorEntry(
            name="random",
            help="the query's own block and others at random",
            source="baseline",
            place="fixed:RandomBlocks",
            learns_by="nothing",
        ),
        AttentionSelectorEntry(
            name="oracle",
            help="the blocks with the most dense attention",
            source="upper bound",
            place="fixed:Oracle",
            reads=_SHARES,
            learns_by="nothing",
        ),
    ),
)
