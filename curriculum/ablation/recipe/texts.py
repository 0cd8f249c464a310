"""What the model reads: a prefix of demonstrations in chunks, and the query behind it; and what such a pair is called.

Contract: `"".join(prefix(demos)) + query(demos, row)` is the whole prompt, and a demonstration's chunk does not depend on what
follows it, so orders that begin alike share their first chunks. A chat template that rewrites earlier turns cannot be
cut so: then the prefix is empty and the query is the whole prompt.

A pair's name holds the rule by which labels are scored (`token_tree.RULE`) where the rule matters for the query. Outcomes of an
earlier version, which scored all labels from one boundary, are therefore found again only where its boundary was the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.errors import SparsortError
from sparsort.scoring.answers.token_tree import RULE, moves_boundary
from sparsort.scoring.prompts.chat_templates import apply_chat_template, need_chat_template
from sparsort.scoring.prompts.prompt import Encoder

Row = Mapping[str, Any]

# An answer that stands in no template.
_STAND_IN = "⟦answer⟧"
_WITHOUT_CHAT = "leave out chat=True (--chat; in a task file, set chat = false)."


class Texts:
    """Prompts of one task.

    Args:
        task: the task.
        tokenizer: the model's: its chat template makes the turns of a task in chat, and it decides how `pair` names a query. A
            plain task of which no pair is named can do without (None).

    Attributes:
        answers: (L,) what is scored behind a query, a label each. Where one label begins another ("good", "good film") it
            would win whenever the other does, so all are scored with what stands behind them in demonstrations: the
            separator, or in chat the mark that ends a turn, where the template has one.

    Raises:
        SparsortError: the task is in chat, and the tokenizer has no chat template, or one that refuses the task's turns.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._last: tuple[list[Row], tuple[str, ...]] | None = None
        if task.chat:
            need_chat_template(tokenizer, step=f"The task {task.name!r} is in chat: {_WITHOUT_CHAT}")
        self.answers = self._answers()
        generated = {"stop": task.stop, "max_new_tokens": task.max_new_tokens}
        self._asked = json.dumps(self.answers or generated)
        self._names: dict[str, str] = {}
        if task.chat:
            self.query([], "x")

    def prefix(self, demos: Sequence[Row]) -> tuple[str, ...]:
        """What stands before the query, in chunks; () where nothing does or it cannot be cut."""
        if not self.task.chat:
            blocks = [self.task.instruction] if self.task.instruction else []
            blocks += [self.task.demo_text(demo) for demo in demos]
            return tuple(block + self.task.separator for block in blocks)
        # A template is slow to fill, and one prefix is asked for query by query.
        if self._last is None or self._last[0] != list(demos):
            self._last = (list(demos), self._chat_prefix(demos))
        return self._last[1]

    def query(self, demos: Sequence[Row], text: str) -> str:
        """The query `text` (of `Task.query_text` or `content_free_texts`) as it stands behind `prefix(demos)`."""
        if not self.task.chat:
            return text
        whole = self._rendered([*self._turns(demos), {"role": "user", "content": text}], ask=True)
        return whole[len("".join(self.prefix(demos))) :]

    def pair(self, chunks: Sequence[str], query: str) -> tuple[str, str]:
        """Digests of a prefix and a query: the pair that an outcome belongs to."""
        plain, by_rule = self.query_names(query)
        if plain not in self._names:
            moved = bool(self.answers) and moves_boundary(self._encoder, query, self.answers)
            self._names[plain] = by_rule if moved else plain
        return digest("".join(chunks)), self._names[plain]

    def own_pair(self, chunks: Sequence[str], query: str) -> tuple[str, str]:
        """The pair of a loss on the query's own text, which no label changes."""
        return digest("".join(chunks)), self.query_names(query)[0]

    def query_names(self, query: str) -> tuple[str, str]:
        """The two digests that a query may have in pairs: where any rule scores its labels alike, and where the rule matters."""
        return digest(f"{query}\0{self._asked}"), digest(f"{query}\0{self._asked}\0{RULE}")

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer, max_length=None, chat=self.task.chat)

    def _chat_prefix(self, demos: Sequence[Row]) -> tuple[str, ...]:
        chunks, before = [], ""
        first = 0 if self.task.system is not None else 1
        for count in range(first, len(demos) + 1):
            try:
                now = self._rendered(self._turns(demos[:count]), ask=False)
            except SparsortError:
                # A template that wants a user's turn last: whole prompts are filled by `query`, which says what fails there.
                return ()
            if not now.startswith(before):
                return ()
            chunks.append(now[len(before) :])
            before = now
        probe = self._rendered([*self._turns(demos), {"role": "user", "content": "x"}], ask=True)
        return tuple(chunk for chunk in chunks if chunk) if probe.startswith(before) else ()

    def _answers(self) -> list[str]:
        # A chat template puts its own marks around an answer, and demonstrations there are stripped.
        texts = [text.strip() if self.task.chat else text for text in self.task.label_texts()]
        if not any(other != text and other.startswith(text) for text in texts for other in texts):
            return texts
        end = self._end_of_turn() if self.task.chat else self.task.separator
        return [text + end for text in texts]

    def _end_of_turn(self) -> str:
        """What the chat template writes behind an answer; "" where it writes nothing, or cannot end with one."""
        turns = [*self._turns([]), {"role": "user", "content": "x"}, {"role": "assistant", "content": _STAND_IN}]
        try:
            _, found, tail = self._rendered(turns, ask=False).rpartition(_STAND_IN)
        except SparsortError:
            return ""
        return (tail.rstrip() or tail) if found else ""

    def _turns(self, demos: Sequence[Row]) -> list[dict[str, str]]:
        turns = [] if self.task.system is None else [{"role": "system", "content": self.task.system}]
        for demo in demos:
            turns.append({"role": "user", "content": self.task.query_text(demo).strip()})
            turns.append({"role": "assistant", "content": self.task.answer_text(demo).strip()})
        return turns

    def _rendered(self, turns: list[dict[str, str]], *, ask: bool) -> str:
        if not turns:
            return ""
        without = "" if self.task.system is None else "Leave out its system turn, or "
        return apply_chat_template(
            self._tokenizer,
            [(turn["role"], turn["content"]) for turn in turns],
            ask=ask,
            step=f"They are those of the task {self.task.name!r}. {without}{_WITHOUT_CHAT}",
        )


def digest(text: str) -> str:
    """128 bits of the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
