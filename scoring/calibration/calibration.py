"""Calibrations: which candidate score follows which reference, for one model, prompt and data; their file, and their scorer.

Contract: `compare.compare` makes a `Calibration`, and `CalibratedScorer` scores rows with it. The file is one versioned JSON
object with the complete definition of the score (model, weights, prompt, site, pooling, metric, fitted outlier rule,
orientation), the verdicts, the numbers of every candidate to four digits, and a digest of all of this. A file of version 1 has
no digest; it is accepted if its redundant parts (verdict, sentence, definition) agree.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack, get_args

import numpy as np

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.calibration.correlation import Array
from sparsort.scoring.calibration.definition import Definition
from sparsort.scoring.calibration.verdict import Associations, HeldOut, Judgement, Verdict
from sparsort.scoring.data.rows import RowSource
from sparsort.scoring.model.spec import ModelOptions, ModelSpec
from sparsort.scoring.prompts.prompt import Encoder, Prompt, identify_tokenizer
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.scorers.base import Request
from sparsort.scoring.scorers.candidates import Candidate
from sparsort.scoring.scorers.sparsity import ModelJob, SparsityScorer
from sparsort.storage.files import write_atomically
from sparsort.storage.integrity import as_written, check_version, is_sealed, parse_own_json, seal

_LOG = logging.getLogger("sparsort")

FORMAT = "sparsort-calibration"
VERSION = 2
_UNSEALED = 1
LENGTH = "length"
# The reason in the file next to the numbers of the candidates, if some of them are null.
_NULLS = (
    "null: the candidate was not compared with this reference, does not vary (in fixed_…: once length is held fixed), varies in "
    "too few draws for an interval, or the reference has fewer than three levels"
)

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_COLUMNS = tuple(Associations.__dataclass_fields__)
# The fields of a `Judgement` that the file holds unchanged.
_FIELDS = ("verdict", "n_rows", "n_levels", "best", "orientation")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The result of comparing candidate scores with references.

    Attributes:
        definition: the score to use: the candidate that follows `target` best with length held fixed, with the sign that makes
            it rise with difficulty.
        target: the reference by which the score was chosen.
        candidates: the names of all C candidates.
        judgements: reference → the candidates' relation to it; arrays are (C,), and indices refer to `candidates`.
        left_out: sentences about what was not compared, with the reason.
        n_rows: rows of the data; each judgement has the number of rows that could be compared.
        settings: draws, permutations, level, seed, `source` and the environment.
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
        """Return the verdict on one reference, by default the target, as a sentence with its numbers."""
        # Files of version 1 hold this sentence, and loading compares it (`_check_repeated`): a changed text would refuse them.
        name = reference or self.target
        judgement = self.judgements[name]
        percent = f"{100 * float(self.settings.get('level', 0.95)):g} %"
        both = f"length held fixed {_interval(judgement.fixed)}, plain {_interval(judgement.plain)}"
        numbers = f"held-out ρ with {_NAMES.get(name, name)}: {both}; {percent} intervals, {judgement.n_rows} rows"
        best = self.candidates[judgement.best]
        if judgement.verdict == "carries difficulty":
            direction = "a higher value is harder" if judgement.orientation > 0 else "a lower value is harder"
            return f"Carries difficulty: {best}, {direction} ({numbers})."
        if judgement.verdict == "carries length only":
            return f"Carries length only: what follows {_NAMES.get(name, name)} goes when length is held fixed ({numbers})."
        return f"Carries nothing here: no candidate follows {_NAMES.get(name, name)} on rows that did not choose it ({numbers})."

    def best(self, reference: str, count: int = 5) -> list[dict[str, Any]]:
        """Return the candidates that follow a reference most closely, by |ρ| with length held fixed (plain |ρ| for length).

        Raises:
            SparsortError: there is no such reference.
        """
        if reference not in self.judgements:
            raise unknown_choice("reference", reference, self.judgements)
        numbers = self.judgements[reference].associations
        key = np.abs(numbers.rho if reference == LENGTH else numbers.fixed_rho)
        order = np.argsort(-np.nan_to_num(key, nan=-1.0), kind="stable")[:count]
        return [
            {"candidate": self.candidates[place], **{name: _number(getattr(numbers, name)[place]) for name in _COLUMNS}}
            for place in order.tolist()
        ]

    def save(self, path: str | Path) -> None:
        """Write the file, atomically.

        Raises:
            SparsortError: the file cannot be written.
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
            SparsortError: it is missing, damaged, of another version, or not a calibration.
        """
        path = Path(path).expanduser()
        again = f"Make it again with sparsort calibrate … --out {path}."
        try:
            values = parse_own_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            make = f"Make one with sparsort calibrate … --out {path}."
            raise SparsortError(f"there is no calibration {path}. {make}") from None
        except (OSError, ValueError) as error:
            raise SparsortError(f"{path} cannot be read as a calibration ({error}). {again}") from error
        with as_written(path, next_step=again):
            calibration = cls.from_dict(values, str(path))
        if values["version"] != _UNSEALED and not is_sealed(values):
            raise SparsortError(f"{path} is damaged: it has changed since it was written. {again}")
        return calibration

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as JSON values, with numbers to four digits and NaN as null."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "verdict": self.verdict}
        values |= {"sentence": self.sentence(), "target": self.target, "definition": asdict(self.definition)}
        values |= {"n_rows": self.n_rows, "left_out": list(self.left_out), "settings": dict(self.settings)}
        values |= {"candidates": list(self.candidates)}
        # `save` writes one line per key, so each reference has a key of its own, and a person can read the file.
        return values | {f"reference {name}": _judgement_to_json(one) for name, one in self.judgements.items()}

    @classmethod
    def from_dict(cls, values: Any, name: str = "this") -> Calibration:
        """Restore what `to_dict` returned; `name` is its name in messages.

        Raises:
            SparsortError: it is of another version, or damaged.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise SparsortError(
                f"{name} is not a calibration of sparsort. Make one with sparsort calibrate … --out FILE."
            )
        newer = "Update sparsort, or calibrate again."
        check_version(values.get("version"), (_UNSEALED, VERSION), name, damaged="Calibrate again.", other=newer)
        try:
            _check_types(values, _TYPES)
            _check_types(values["definition"], _DEFINITION_TYPES)
            definition = {**values["definition"], "candidate": Candidate(**values["definition"]["candidate"])}
            definition["turns"] = tuple((str(role), str(text)) for role, text in definition["turns"])
            calibration = cls(
                definition=Definition(**definition),
                target=values["target"],
                candidates=tuple(values["candidates"]),
                judgements={
                    key.removeprefix("reference "): _judgement_from_json(value, len(values["candidates"]))
                    for key, value in values.items()
                    if key.startswith("reference ")
                },
                left_out=values["left_out"],
                n_rows=values["n_rows"],
                settings=values["settings"],
            )
            calibration._check_repeated(values)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SparsortError(f"{name} is damaged: {error!r}. Make it again with sparsort calibrate.") from error
        return calibration

    def _check_repeated(self, values: Mapping[str, Any]) -> None:
        """Check that the redundant parts of the JSON agree, which is the only protection of a file of version 1.

        Raises:
            ValueError: they do not.
        """
        target = self.judgements[self.target]
        if values["verdict"] != self.verdict:
            raise ValueError("its verdict is not the one of its numbers")
        numbers = [value for part in (target.plain, target.fixed) for value in (part.rho, part.low, part.high)]
        # Version 1 did not state why a number is missing, so its sentence can be compared only if none is.
        if all(map(math.isfinite, numbers)) and not _alike(values["sentence"], self.sentence()):
            raise ValueError("its sentence is not the one of its numbers")
        # Site, pooling, rule and metric are both in the definition and in the name of the candidate.
        if (self.definition.candidate.name, self.definition.orientation) != (
            self.candidates[target.best],
            target.orientation,
        ):
            raise ValueError("its definition is not the candidate that was chosen")


class CalibratedScorer(SparsityScorer):
    """Ranks examples by a calibrated score, with the sign that makes `difficulty` rise with the reference.

    Its scores are of the kind "calibrated". They can be used with the orders `easy_to_hard` and `hard_to_easy`, but not with
    those by sparsity, because a calibration may find that denser states are harder. The outlier rule is the fitted one.

    Args:
        calibration: a `Calibration`, or the path of its file.
        model: None for the calibrated model, loaded by its name; else a model with the same weights. For other arguments see
            `ModelScorer`.

    Raises:
        SparsortError: the weights or the tokenizer of the model differ from the calibrated ones.
    """

    kind: ClassVar[str] = "calibrated"

    def __init__(
        self, calibration: Calibration | str | Path, model: Any = None, **options: Unpack[ModelOptions]
    ) -> None:
        self.calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        definition = self.definition = self.calibration.definition
        spec = ModelSpec.of(definition.model if model is None else model, **options)
        if model is None:
            spec = replace(spec, revision=spec.revision or definition.revision)
        super().__init__(spec, **vars(definition.candidate), l0_threshold=definition.l0_threshold)
        recorded = definition.tokenizer
        tokenizer = identify_tokenizer(self.loaded.tokenizer, chat=definition.prompt.is_chat, recorded=recorded)
        definition.refuse_other_model(self.loaded.name, self.loaded.weights, tokenizer)
        if self.calibration.verdict != "carries difficulty":
            _LOG.warning(
                "the score of this calibration is not known to carry difficulty. %s", self.calibration.sentence()
            )

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"prompt": self.definition.turns[-1][1]}

    def read_prompt(self, spec: PromptSpec) -> Prompt | None:
        """Return the prompt that a caller described, or the calibrated one if the caller described none.

        Raises:
            SparsortError: a system turn was given for the calibrated prompt.
        """
        return self.definition.complete(spec).read()

    def _job(self, source: RowSource, request: Request, encoder: Encoder, previous: dict[str, Any] | None) -> ModelJob:
        definition = self.definition
        definition.refuse_other_prompt(request.prompt)
        # Passed in place of the previous run's provenance, so that the job restores the fitted outlier rule.
        fitted: dict[str, Any] = {"weights": definition.weights, "site": self.site.name, "pooling": self.pooling}
        fitted |= {"outliers": dict(definition.fit), "tokenizer": (previous or {}).get("tokenizer")}
        job = super()._job(source, request, encoder, fitted)
        # Only the calibrated metric has a known direction.
        job.provenance["orientation"] = {self.metric: definition.orientation}
        job.provenance["calibration"] = definition.digest
        job.provenance["environment"]["calibration"] = self.calibration.sentence()
        return job


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Check that a JSON object has these fields, with values of these types.

    Raises:
        LookupError, ValueError: it does not.
    """
    for name, kind in types.items():
        # A boolean is an instance of int too, and no field is one.
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{name} is of type {type(values[name]).__name__}, not {expected}")


# The types in the file. A seal proves only that the values have not changed, not that they ever had these types.
_TYPES = {"definition": dict, "settings": dict, "candidates": list, "left_out": list, "n_rows": int, "target": str}
_DEFINITION_TYPES = {
    **dict.fromkeys(("model", "weights", "tokenizer", "dtype"), str),
    **dict.fromkeys(("answer", "revision"), str | None),
    **{"candidate": dict, "fit": dict, "l0_threshold": int | float, "orientation": int, "turns": list | tuple},
}
# The words for references in sentences.
_NAMES = {"loss": "the model's own loss", "correct": "its errors", LENGTH: "length"}


def _interval(part: HeldOut) -> str:
    if not math.isfinite(part.rho):
        return f"unknown ({part.reason})"
    if part.reason:
        return f"{part.rho:+.2f} (no interval: {part.reason}), p = {part.p:.3f}"
    return f"{part.rho:+.2f} [{part.low:+.2f}, {part.high:+.2f}], p = {part.p:.3f}"


def _alike(one: str, other: str) -> bool:
    """Whether two sentences are equal, apart from differences in numbers that rounding in the file explains."""
    if _NUMBER.sub("", one) != _NUMBER.sub("", other):
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    # Sentences have two digits after the point, which may differ by one in the last.
    return all(abs(float(a) - float(b)) < 0.011 for a, b in pairs)


def _number(value: Any) -> float | None:
    number = float(value)
    return round(number, 4) if math.isfinite(number) else None


def _judgement_to_json(judgement: Judgement) -> dict[str, Any]:
    def held_out(part: HeldOut) -> dict[str, Any]:
        values = {name: _number(value) if isinstance(value, float) else value for name, value in asdict(part).items()}
        return values | {"reason": part.reason or None}

    columns: dict[str, Any] = {
        name: [_number(value) for value in getattr(judgement.associations, name)] for name in _COLUMNS
    }
    if any(None in values for values in columns.values()):
        columns["reason"] = _NULLS
    fields = {name: getattr(judgement, name) for name in _FIELDS}
    parts = {"plain": held_out(judgement.plain), "fixed": held_out(judgement.fixed)}
    return fields | parts | {"associations": columns}


def _judgement_from_json(fields: Mapping[str, Any], count: int) -> Judgement:
    def numbers(values: Sequence[float | None]) -> Array:
        if len(values) != count:
            raise ValueError(f"{len(values)} numbers for {count} candidates")
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def held_out(part: Mapping[str, Any]) -> HeldOut:
        measured = {name: math.nan if part[name] is None else float(part[name]) for name in ("rho", "low", "high", "p")}
        (one, other), (sign, other_sign) = part["chosen"], part["orientation"]
        return HeldOut(
            **measured,
            chosen=(one, other),
            orientation=(sign, other_sign),
            holds=bool(part["holds"]),
            # A file of version 1 has no reasons.
            reason=part.get("reason") or "",
        )

    if fields["verdict"] not in get_args(Verdict) or not 0 <= fields["best"] < count:
        raise ValueError(f"the verdict {fields['verdict']!r} on candidate {fields['best']}")
    return Judgement(
        **{name: fields[name] for name in _FIELDS},
        plain=held_out(fields["plain"]),
        fixed=held_out(fields["fixed"]),
        associations=Associations(**{name: numbers(fields["associations"][name]) for name in _COLUMNS}),
    )
