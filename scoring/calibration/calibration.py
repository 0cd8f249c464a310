"""Which candidate score follows which reference, for one model, prompt and data: what `sparsort.calibrate` finds, and its file.

Contract: `compare.compare` makes a `Calibration` and `calibrated.CalibratedScorer` applies it. The file is one JSON object of a
stated version that holds the whole definition of the score (model, weights, prompt, site, pooling, metric, fitted outlier rule,
orientation), the verdicts, every candidate's numbers, to four digits, and a digest of all of it. A file of version 1 has no
digest: it is taken if the parts that repeat one another (verdict, sentence, definition) agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.calibration.resampling import Array
from sparsort.scoring.calibration.verdict import Associations, HeldOut, Judgement, Verdict
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.candidates import Candidate
from sparsort.storage.files import write_atomically
from sparsort.storage.integrity import as_written, check_version, is_sealed, parse_own_json, seal

FORMAT = "sparsort-calibration"
VERSION = 2
_UNSEALED = 1
LENGTH = "length"
# Written next to the numbers of all candidates, if some are null.
_NULLS = (
    "null: the candidate was not compared with this reference, does not vary (in fixed_…: once length is held fixed), varies in "
    "too few draws for an interval, or the reference has fewer than three levels"
)

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_COLUMNS = tuple(Associations.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One score, entirely: what has to be the same for its numbers to mean the same.

    Attributes:
        candidate: site, pooling, outlier rule and metric.
        orientation: +1 where a higher value was found harder, else -1.
        fit: the outlier rule as fitted (`pooling.OutlierFit.record`).
        l0_threshold: threshold of `l0_absolute`.
        turns: the prompt's (role, template) pairs; `answer` its answer's template, None where the score reads none.
        model: the name it was loaded by, at `revision`; `weights` and `tokenizer` are their hashes.
        dtype: what it was computed in: recorded, not compared, since ranks agree across dtypes.
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
        """What the score reads."""
        return Prompt(turns=self.turns, answer=self.answer)

    @property
    def digest(self) -> str:
        """128 bits over everything that changes a number, as hexadecimal digits."""
        parts = asdict(self)
        for name in ("model", "revision", "dtype"):
            del parts[name]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def complete(self, spec: PromptSpec) -> PromptSpec:
        """The prompt that a caller described; where it has no template and no other column, the calibrated one.

        Raises:
            SparsortError: a system turn was given for the calibrated prompt, which has its own turns.
        """
        if spec.template is not None or (spec.messages is not None and spec.messages != self.prompt.messages):
            return spec
        if self.prompt.messages is not None:
            return replace(spec, template=self.prompt, messages=None)
        if self.turns[0][0] == "text":
            return replace(spec, template=self.turns[0][1], answer=spec.answer or self.answer)
        if spec.system is not None:
            raise SparsortError("the calibrated prompt has its own turns. Leave system (--system) away.")
        turns = [{"role": role, "content": text} for role, text in self.turns]
        return replace(spec, template=turns, answer=spec.answer or self.answer)

    def refuse_other_prompt(self, asked: Prompt) -> None:
        """Refuse to score by another prompt than the one that was calibrated.

        Raises:
            SparsortError: the prompt differs, or an answer is to be read where none was, or the other way round.
        """
        if asked.turns != self.turns:
            raise SparsortError(
                f"this calibration is of the prompt {_shown(self.turns)}, and {_shown(asked.turns)} was asked for. What a score "
                "says changes with the prompt: leave prompt (--prompt) and messages (--messages) out for the calibrated one, or "
                "calibrate this one."
            )
        if asked.answer != self.answer:
            what = f"reads the answer {self.answer!r}" if self.answer is not None else "reads the prompt alone"
            step = "pass that answer (--answer)" if self.answer is not None else "leave the answer (--answer) away"
            raise SparsortError(f"this calibration {what}, and the answer {asked.answer!r} was asked for: {step}.")

    def refuse_other_model(self, name: str, weights: str, tokenizer: str) -> None:
        """Refuse a model whose weights or tokenizer are not those that were calibrated.

        Raises:
            SparsortError: they differ.
        """
        for what, wanted, found in (("weights", self.weights, weights), ("tokenizer", self.tokenizer, tokenizer)):
            if wanted != found:
                at = f" at revision {self.revision}" if self.revision else ""
                raise SparsortError(
                    f"this calibration is of the model {self.model!r}{at}, and the {what} of {name!r} are others "
                    f"({wanted[:19]}… against {found[:19]}…). Pass that model (--model, --revision), or calibrate this one."
                )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found.

    Attributes:
        definition: the score to use: the candidate that follows `target` best with length held fixed, turned so that it rises
            with difficulty.
        target: the reference that it was chosen by.
        candidates: the names of all that were tried, C of them.
        judgements: reference → what the candidates are to it; arrays are (C,), indices count in `candidates`.
        left_out: what was not compared, and why.
        n_rows: rows of the data; each judgement has the number of those that could be compared.
        settings: draws, permutations, level and seed; `source` and the environment.
    """

    definition: Definition
    target: str
    candidates: tuple[str, ...]
    judgements: Mapping[str, Judgement]
    left_out: Sequence[str] = ()
    n_rows: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the target."""
        return self.judgements[self.target].verdict

    def sentence(self, reference: str | None = None) -> str:
        """The verdict on one reference, by default the target, in words with its numbers."""
        name = reference or self.target
        found = self.judgements[name]
        percent = f"{100 * float(self.settings.get('level', 0.95)):g} %"
        held = f"length held fixed {_interval(found.fixed)}, plain {_interval(found.plain)}"
        numbers = f"held-out ρ with {_NAMES.get(name, name)}: {held}; {percent} intervals, {found.n_rows} rows"
        best = self.candidates[found.best]
        if found.verdict == "carries difficulty":
            way = "a higher value is harder" if found.orientation > 0 else "a lower value is harder"
            return f"Carries difficulty: {best}, {way} ({numbers})."
        if found.verdict == "carries length only":
            return f"Carries length only: what follows {_NAMES.get(name, name)} goes when length is held fixed ({numbers})."
        return f"Carries nothing here: no candidate follows {_NAMES.get(name, name)} on rows that did not choose it ({numbers})."

    def best(self, reference: str, count: int = 5) -> list[dict[str, Any]]:
        """The candidates that follow a reference most closely, by |ρ| with length held fixed where there is one.

        Raises:
            SparsortError: there is no such reference.
        """
        if reference not in self.judgements:
            raise unknown_choice("reference", reference, self.judgements)
        found = self.judgements[reference].associations
        key = np.abs(found.rho if reference == LENGTH else found.fixed_rho)
        order = np.argsort(-np.nan_to_num(key, nan=-1.0), kind="stable")[:count]
        return [
            {"candidate": self.candidates[place], **{name: _number(getattr(found, name)[place]) for name in _COLUMNS}}
            for place in order.tolist()
        ]

    def save(self, path: str | Path) -> None:
        """Write the file, atomically.

        Raises:
            SparsortError: the disk refuses.
        """
        text = ",\n".join(
            f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
            for key, value in seal(self.to_dict()).items()
        )
        with write_atomically(Path(path).expanduser()) as temporary:
            temporary.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            SparsortError: it is missing, damaged, of another version, or something else.
        """
        path = Path(path).expanduser()
        try:
            found = parse_own_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SparsortError(
                f"there is no calibration {path}. Make one with sparsort calibrate … --out {path}."
            ) from None
        except (OSError, ValueError) as error:
            raise SparsortError(
                f"{path} cannot be read as a calibration ({error}). Make it again with sparsort calibrate … --out {path}."
            ) from error
        with as_written(path, next_step=f"Make it again with sparsort calibrate … --out {path}."):
            made = cls.from_dict(found, str(path))
        if found["version"] != _UNSEALED and not is_sealed(found):
            raise SparsortError(
                f"{path} is damaged: it has changed since it was written. Make it again with sparsort calibrate … --out {path}."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON values; numbers to four digits, NaN as null."""
        made: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "verdict": self.verdict,
            "sentence": self.sentence(),
        }
        made |= {"target": self.target, "definition": asdict(self.definition), "n_rows": self.n_rows}
        made |= {"left_out": list(self.left_out), "settings": dict(self.settings), "candidates": list(self.candidates)}
        # A line a reference, so that a person can find the way about the file.
        return made | {f"reference {name}": _judgement_to_json(found) for name, found in self.judgements.items()}

    @classmethod
    def from_dict(cls, found: Any, name: str = "this") -> Calibration:
        """What `to_dict` gave.

        Raises:
            SparsortError: it is of another version, or not whole.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise SparsortError(f"{name} is no calibration of sparsort. Make one with sparsort calibrate … --out FILE.")
        newer = "Update sparsort, or calibrate again."
        check_version(found.get("version"), (_UNSEALED, VERSION), name, damaged="Calibrate again.", other=newer)
        try:
            _check_types(found, _TYPES)
            _check_types(found["definition"], _DEFINITION_TYPES)
            definition = {**found["definition"], "candidate": Candidate(**found["definition"]["candidate"])}
            definition["turns"] = tuple((str(role), str(text)) for role, text in definition["turns"])
            made = cls(
                definition=Definition(**definition),
                target=found["target"],
                candidates=tuple(found["candidates"]),
                judgements={
                    key.removeprefix("reference "): _judgement_from_json(value, len(found["candidates"]))
                    for key, value in found.items()
                    if key.startswith("reference ")
                },
                left_out=found["left_out"],
                n_rows=found["n_rows"],
                settings=found["settings"],
            )
            made._check_repeated(found)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SparsortError(f"{name} is not whole: {error!r}. Make it again with sparsort calibrate.") from error
        return made

    def _check_repeated(self, found: Mapping[str, Any]) -> None:
        """Check that the parts of the JSON that repeat one another agree; a file of version 1 has no other guard.

        Raises:
            ValueError: it does not.
        """
        chosen = self.judgements[self.target]
        if found["verdict"] != self.verdict:
            raise ValueError("its verdict is not the one of its numbers")
        numbers = [value for held in (chosen.plain, chosen.fixed) for value in (held.rho, held.low, held.high)]
        # Version 1 did not say why a number is absent, so its sentence can be compared only where all are there.
        if all(map(math.isfinite, numbers)) and not _alike(found["sentence"], self.sentence()):
            raise ValueError("its sentence is not the one of its numbers")
        # Site, pooling, rule and metric are in the definition and in the candidate's name.
        if (self.definition.candidate.name, self.definition.orientation) != (
            self.candidates[chosen.best],
            chosen.orientation,
        ):
            raise ValueError("its definition is not the candidate that was chosen")


def _check_types(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse a JSON object without some of its fields, or with a field of another type.

    Raises:
        LookupError, ValueError: the object is not as it was written.
    """
    for name, kinds in types.items():
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is of type {type(values[name]).__name__}, not {expected}")


# The types in the file. A seal shows that values have not changed, not that they were ever of these types.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("definition", "settings"), (dict,)),
    **dict.fromkeys(("candidates", "left_out"), (list,)),
    **{"n_rows": (int,), "target": (str,)},
}
_DEFINITION_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "weights", "tokenizer", "dtype"), (str,)),
    **dict.fromkeys(("answer", "revision"), (str, type(None))),
    **{
        "candidate": (dict,),
        "fit": (dict,),
        "l0_threshold": (int, float),
        "orientation": (int,),
        "turns": (list, tuple),
    },
}
# How references are called in sentences.
_NAMES = {"loss": "the model's own loss", "correct": "its errors", LENGTH: "length"}


def _interval(held: HeldOut) -> str:
    if not math.isfinite(held.rho):
        return f"unknown ({held.reason})"
    if held.reason:
        return f"{held.rho:+.2f} (no interval: {held.reason}), p = {held.p:.3f}"
    return f"{held.rho:+.2f} [{held.low:+.2f}, {held.high:+.2f}], p = {held.p:.3f}"


def _alike(one: str, other: str) -> bool:
    """Whether two sentences differ by no more than what rounding the numbers in the file does to those in the sentence."""
    if _NUMBER.sub("", one) != _NUMBER.sub("", other):
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) < 0.011 for a, b in pairs)


def _shown(turns: Sequence[tuple[str, str]]) -> str:
    return " / ".join(repr(text) if role == "text" else f"{role}: {text!r}" for role, text in turns)


def _number(value: Any) -> float | None:
    number = float(value)
    return round(number, 4) if math.isfinite(number) else None


def _judgement_to_json(found: Judgement) -> dict[str, Any]:
    def held(part: HeldOut) -> dict[str, Any]:
        made = {name: _number(value) if isinstance(value, float) else value for name, value in asdict(part).items()}
        return made | {"reason": part.reason or None}

    columns: dict[str, Any] = {
        name: [_number(value) for value in getattr(found.associations, name)] for name in _COLUMNS
    }
    if any(None in values for values in columns.values()):
        columns["reason"] = _NULLS
    plain = {name: getattr(found, name) for name in ("verdict", "n_rows", "n_levels", "best", "orientation")}
    return plain | {"plain": held(found.plain), "fixed": held(found.fixed), "associations": columns}


def _judgement_from_json(found: Mapping[str, Any], count: int) -> Judgement:
    def numbers(values: Sequence[float | None]) -> Array:
        if len(values) != count:
            raise ValueError(f"{len(values)} numbers for {count} candidates")
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def held(part: Mapping[str, Any]) -> HeldOut:
        rho, low, high, p = (
            math.nan if part[name] is None else float(part[name]) for name in ("rho", "low", "high", "p")
        )
        (one, other), (sign, other_sign) = part["chosen"], part["orientation"]
        return HeldOut(
            rho=rho,
            low=low,
            high=high,
            p=p,
            chosen=(one, other),
            orientation=(sign, other_sign),
            holds=bool(part["holds"]),
            reason=part.get("reason") or "",
        )

    if found["verdict"] not in get_args(Verdict) or not 0 <= found["best"] < count:
        raise ValueError(f"the verdict {found['verdict']!r} on candidate {found['best']}")
    return Judgement(
        **{name: found[name] for name in ("verdict", "n_rows", "n_levels", "best", "orientation")},
        plain=held(found["plain"]),
        fixed=held(found["fixed"]),
        associations=Associations(**{name: numbers(found["associations"][name]) for name in _COLUMNS}),
    )
