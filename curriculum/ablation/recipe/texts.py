"""Prompts as pairs of a prefix and a query, and the digests that identify a pair in the store.

Contract: `"".join(prefix(demos)) + query(demos, text)` is the whole prompt. The prefix is a sequence of chunks, one for each
demonstration. A chunk does not depend on those after it, so orders with the same beginning share their first chunks. With a
chat template that rewrites earlier turns this is impossible: the prefix is then empty, and the query is the whole prompt.

The digest of a query includes the rule by which labels are scored (`token_tree.RULE`) if the rule matters for that query. An
earlier version scored all labels from one token boundary; its outcomes are reused only for queries whose boundary is the same.
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

# A text that no chat template contains, so that it can be found in a rendered one.
_PLACEHOLDER = "⟦answer⟧"
_WITHOUT_CHAT = "omit chat=True (--chat; in a task file, set chat = false)."


class Texts:
    """The prompts of one task.

    Args:
        task: the task.
        tokenizer: the model's tokenizer, which renders chat turns and determines the digests of `pair`. None is enough for a
            task without chat if `pair` is never called.

    Attributes:
        answers: (L,) the text that is scored after a query for each label. If one label is the beginning of another ("good",
            "good film"), it would be at least as probable as the other for every query. All labels are then scored with the
            text that follows them in a demonstration: the separator, or in chat the template's end-of-turn mark if it has one.

    Raises:
        SparsortError: the task uses chat, and the tokenizer has no chat template, or one that refuses the task's turns.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task = task
        self._tokenizer = tokenizer
        # The chunks of the latest demonstrations: rendering is slow, and callers ask for one prefix once per query.
        self._latest: tuple[list[Row], tuple[str, ...]] | None = None
        if task.chat:
            need_chat_template(tokenizer, step=f"The task {task.name!r} is in chat: {_WITHOUT_CHAT}")
        self.answers = self._answers()
        generation = {"stop": task.stop, "max_new_tokens": task.max_new_tokens}
        # An outcome depends on these besides the prompt, so they are part of a query's digest.
        self._settings = json.dumps(self.answers or generation)
        # Plain digest of a query → its digest in pairs. Finding the boundary tokenizes the query with every label.
        self._query_digests: dict[str, str] = {}
        if task.chat:
            # A template that refuses the task's turns must fail here, before anything runs.
            self.query([], "x")

    def prefix(self, demos: Sequence[Row]) -> tuple[str, ...]:
        """The text before the query, in chunks; () if there is none, or if the template does not allow a cut."""
        if not self.task.chat:
            blocks = [self.task.instruction] if self.task.instruction else []
            blocks += [self.task.demo_text(demo) for demo in demos]
            return tuple(block + self.task.separator for block in blocks)
        if self._latest is None or self._latest[0] != list(demos):
            self._latest = (list(demos), self._chat_prefix(demos))
        return self._latest[1]

    def query(self, demos: Sequence[Row], text: str) -> str:
        """The query `text` (of `Task.query_text` or `content_free_texts`) as the model reads it after `prefix(demos)`."""
        if not self.task.chat:
            return text
        prompt = self._rendered([*self._turns(demos), {"role": "user", "content": text}], ask=True)
        # `_chat_prefix` has checked that prompts begin with the prefix.
        return prompt[len("".join(self.prefix(demos))) :]

    def pair(self, chunks: Sequence[str], query: str) -> tuple[str, str]:
        """The digests of a prefix and a query: the pair that an outcome belongs to."""
        plain, with_rule = self.query_digests(query)
        if plain not in self._query_digests:
            rule_matters = bool(self.answers) and moves_boundary(self._encoder, query, self.answers)
            self._query_digests[plain] = with_rule if rule_matters else plain
        return digest("".join(chunks)), self._query_digests[plain]

    def own_pair(self, chunks: Sequence[str], query: str) -> tuple[str, str]:
        """The pair of a loss on the query's own text, which does not depend on how labels are scored."""
        return digest("".join(chunks)), self.query_digests(query)[0]

    def query_digests(self, query: str) -> tuple[str, str]:
        """The two digests that a query may have in pairs: without the rule for scoring labels, and with it."""
        return digest(f"{query}\0{self._settings}"), digest(f"{query}\0{self._settings}\0{RULE}")

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer, max_length=None, chat=self.task.chat)

    def _chat_prefix(self, demos: Sequence[Row]) -> tuple[str, ...]:
        """The chunks of the turns before the query, found by rendering one demonstration more at a time."""
        chunks, rendered = [], ""
        # With a system turn, the first chunk is that turn alone.
        first = 0 if self.task.system is not None else 1
        for count in range(first, len(demos) + 1):
            try:
                longer = self._rendered(self._turns(demos[:count]), ask=False)
            except SparsortError:
                # Some templates require that the last turn is the user's. `query` renders such prompts as a whole, and reports
                # the error if that fails too.
                return ()
            if not longer.startswith(rendered):
                return ()
            chunks.append(longer[len(rendered) :])
            rendered = longer
        # The template must also keep the turns as they are once a query follows.
        prompt = self._rendered([*self._turns(demos), {"role": "user", "content": "x"}], ask=True)
        return tuple(chunk for chunk in chunks if chunk) if prompt.startswith(rendered) else ()

    def _answers(self) -> list[str]:
        # Chat demonstrations are stripped, because the template puts its own whitespace around an answer.
        texts = [text.strip() if self.task.chat else text for text in self.task.label_texts()]
        if not any(other != text and other.startswith(text) for text in texts for other in texts):
            return texts
        end = self._end_of_turn() if self.task.chat else self.task.separator
        return [text + end for text in texts]

    def _end_of_turn(self) -> str:
        """The text that the chat template puts after an answer; "" if there is none, or if no prompt may end with an answer."""
        turns = [*self._turns([]), {"role": "user", "content": "x"}, {"role": "assistant", "content": _PLACEHOLDER}]
        try:
            _, placeholder, tail = self._rendered(turns, ask=False).rpartition(_PLACEHOLDER)
        except SparsortError:
            return ""
        return (tail.rstrip() or tail) if placeholder else ""

    def _turns(self, demos: Sequence[Row]) -> list[dict[str, str]]:
        turns = [] if self.task.system is None else [{"role": "system", "content": self.task.system}]
        for demo in demos:
            turns.append({"role": "user", "content": self.task.query_text(demo).strip()})
            turns.append({"role": "assistant", "content": self.task.answer_text(demo).strip()})
        return turns

    def _rendered(self, turns: list[dict[str, str]], *, ask: bool) -> str:
        if not turns:
            return ""
        without = "" if self.task.system is None else "Omit its system turn, or "
        return apply_chat_template(
            self._tokenizer,
            [(turn["role"], turn["content"]) for turn in turns],
            ask=ask,
            step=f"They are those of the task {self.task.name!r}. {without}{_WITHOUT_CHAT}",
        )


def digest(text: str) -> str:
    """The first 128 bits of the SHA-256 of a text, in hexadecimal."""
    # Lone surrogates have no UTF-8 form, but a prompt may contain them.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
