"""The definition of one score: everything that has to be the same for two of its numbers to mean the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsort.errors import SparsortError
from sparsort.scoring.prompts.functions import is_description
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.candidates import Candidate


@dataclass(frozen=True, kw_only=True)
class Definition:
    """The complete definition of one score.

    Attributes:
        candidate: site, pooling, outlier rule and metric.
        orientation: +1 if higher values were found to be harder, else -1.
        fit: the fitted outlier rule (`pooling.OutlierFit.record`).
        l0_threshold: threshold of `l0_absolute`.
        turns: (role, template) pairs of the prompt.
        answer: template of the answer; None if the score does not read an answer.
        model, revision: the name that the model was loaded by, and its revision.
        weights, tokenizer: hashes of the model's weights and of its tokenizer.
        dtype: dtype of the computation, which is recorded but not compared, since ranks agree across dtypes.
    """

    candidate: Candidate
    orientation: int
    fit: Mapping[str, Any]
    l0_threshold: float
    turns: tuple[tuple[str, str], ...]
    answer: str | None
    model: str
    revision: str | None
    weights: str
    tokenizer: str
    dtype: str

    @property
    def prompt(self) -> Prompt:
        """The prompt that the score reads."""
        return Prompt(turns=self.turns, answer=self.answer)

    @property
    def digest(self) -> str:
        """A hash of everything that can change a score, 128 bits as hexadecimal digits."""
        # The name and revision only locate the weights, whose hash is included.
        parts = asdict(self)
        for name in ("model", "revision", "dtype"):
            del parts[name]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def complete(self, spec: PromptSpec) -> PromptSpec:
        """Return the prompt that a caller described, or the calibrated one if it has no template and no other column.

        Raises:
            SparsortError: a system turn was given for the calibrated prompt, which has its own turns; or the calibrated prompt is
                a Python function.
        """
        if spec.template is not None or (spec.messages is not None and spec.messages != self.prompt.messages):
            return spec
        if self.prompt.messages is not None:
            return replace(spec, template=self.prompt, messages=None)
        if is_description(self.turns[-1][1]):
            raise SparsortError(
                f"this calibration is for the prompt that the {self.turns[-1][1]} writes, and it cannot contain the "
                "function. Pass this function as prompt= in Python."
            )
        # "text" is the role of a prompt that is one format string, without chat turns.
        is_chat = self.turns[0][0] != "text"
        if is_chat and spec.system is not None:
            raise SparsortError("the calibrated prompt has its own turns. Omit system (--system).")
        turns = [{"role": role, "content": text} for role, text in self.turns]
        return replace(spec, template=turns if is_chat else self.turns[0][1], answer=spec.answer or self.answer)

    def refuse_other_prompt(self, prompt: Prompt) -> None:
        """Refuse to score by a prompt that differs from the calibrated one.

        Raises:
            SparsortError: the turns differ, or the answer does, of which one of the two may have none.
        """
        if prompt.turns != self.turns:
            raise SparsortError(
                f"this calibration is for the prompt {_listed(self.turns)}, but {_listed(prompt.turns)} was given. The "
                "meaning of a score depends on the prompt: omit prompt (--prompt) and messages (--messages) to use the "
                "calibrated one, or calibrate this one."
            )
        if prompt.answer != self.answer:
            text = f"reads the answer {self.answer!r}" if self.answer is not None else "reads the prompt alone"
            step = "pass that answer (--answer)" if self.answer is not None else "omit the answer (--answer)"
            raise SparsortError(f"this calibration {text}, but the answer {prompt.answer!r} was given: {step}.")

    def refuse_other_model(self, name: str, weights: str, tokenizer: str) -> None:
        """Refuse a model whose weights or tokenizer are not those that were calibrated.

        Raises:
            SparsortError: they differ.
        """
        parts = (("different weights", self.weights, weights), ("a different tokenizer", self.tokenizer, tokenizer))
        for difference, expected, actual in parts:
            if expected != actual:
                revision = f" at revision {self.revision}" if self.revision else ""
                raise SparsortError(
                    f"this calibration is for the model {self.model!r}{revision}, and {name!r} has {difference} "
                    f"({actual[:19]}… instead of {expected[:19]}…). Pass that model (--model, --revision), or calibrate this one."
                )


def _listed(turns: Sequence[tuple[str, str]]) -> str:
    return " / ".join(repr(text) if role == "text" else f"{role}: {text!r}" for role, text in turns)
