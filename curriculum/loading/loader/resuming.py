"""The state of a loader: its contents, and the check that a loader can resume from it.

Contract: a state consists of JSON values of less than 1 KiB for any number of rows: a position, which is the number of global
batches consumed, and fingerprints of the plan and of the data. A loader resumes only with the same plan over the same data.
Ranks, workers, prefetching and micro-batches may differ, because the order of global batches does not depend on them. For any
other state the error names the difference and the next step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from sparsort.curriculum.loading.loader import fingerprints
from sparsort.errors import SparsortError
from sparsort.storage.integrity import check_version

if TYPE_CHECKING:
    from sparsort.curriculum.loading.plan.plan import CurriculumPlan

FORMAT = "sparsort-loader"
VERSION = 1

# These settings are written out in a state, so that an error can name them; one digest covers all others.
_SPELLED = ("batch_size", "token_budget", "seed", "mode", "schedule", "direction", "stages", "steps")
_OR_RESTART = "or start again without this state"


def make_state(plan: CurriculumPlan, data: fingerprints.Fingerprint, *, epoch: int, batch: int) -> dict[str, Any]:
    """The state of a loader after `batch` global batches of `epoch`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.fingerprint,
        "data": fingerprints.as_saved(data),
        "settings": _settings(plan),
        "epoch": epoch,
        "batch": batch,
    }


def position_of(state: Any, plan: CurriculumPlan, data: fingerprints.Fingerprint) -> tuple[int, int]:
    """The epoch and the batch to resume with; after a complete epoch, the beginning of the next one.

    Raises:
        SparsortError: the state is not one of a loader, belongs to another version, plan or data, or to a batch that the plan
            does not have.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise SparsortError(
            f"this is not a state of a CurriculumLoader: {_shown(state)}. Pass the value that its state_dict() returned."
        )
    writer, earlier = (
        f"Resume with the sparsort that wrote it, {_OR_RESTART}.",
        f"Resume from an earlier one, {_OR_RESTART}.",
    )
    check_version(state.get("version"), (VERSION,), "the state", damaged=earlier, other=writer)
    if state.get("plan") != plan.fingerprint:
        raise SparsortError(_another_plan(state, plan))
    if differs := fingerprints.difference(state.get("data"), data):
        raise SparsortError(
            f"the data is not the data that the state was written for: {differs}. Resume with that data, {_OR_RESTART}. "
            "If the data is the same and only looks different, give both runs the same CurriculumLoader(fingerprint='a name')."
        )
    epoch, batch = state.get("epoch"), state.get("batch")
    if not _counts(epoch) or not _counts(batch) or batch > plan.n_batches:
        raise SparsortError(
            f"the state is at epoch {epoch!r}, batch {batch!r}, and the plan has {plan.n_batches} batches per epoch. The "
            f"state is damaged: resume from an earlier one, {_OR_RESTART}."
        )
    return (epoch + 1, 0) if batch == plan.n_batches else (epoch, batch)


def _another_plan(state: Mapping[str, Any], plan: CurriculumPlan) -> str:
    saved, now = state.get("settings"), _settings(plan)
    saved = saved if isinstance(saved, Mapping) else {}
    size = saved.get("batch_size")
    if size is not None and size != now["batch_size"]:
        return (
            f"the state was written with a global batch of {size} and this plan has {now['batch_size'] or 'a token budget'}, "
            f"which gives another order. Keep per-device batch × accumulation × processes = {size} and plan with "
            f"batch_size={size}, {_OR_RESTART}."
        )
    differing = [f"{name} {saved[name]!r} → {now[name]!r}" for name in _SPELLED if saved.get(name) != now[name]]
    if differing:
        what = f"plans differ in {', '.join(differing)}"
    elif saved.get("others") != now["others"]:
        what = "plans differ in a setting such as pacing, folds, quotas, packing or max_length"
    elif plan.revision is not None or saved.get("revision") is not None:
        what = f"plan was revised (revision {saved.get('revision') or 'none'} → {now['revision'] or 'none'})"
    else:
        what = "settings are the same, so the plans were made from different scores, groups or lengths"
    return (
        f"the state was written with another plan ({state.get('plan')}, and this is {plan.fingerprint}): the {what}. "
        f"Load that plan with CurriculumPlan.open, {_OR_RESTART}."
    )


def _settings(plan: CurriculumPlan) -> dict[str, Any]:
    every = plan.settings.to_json()
    others = json.dumps({name: value for name, value in every.items() if name not in _SPELLED}, sort_keys=True)
    digest = hashlib.blake2b(others.encode(), digest_size=5).hexdigest()
    revision = plan.revision["number"] if plan.revision else None
    return {**{name: every[name] for name in _SPELLED}, "others": digest, "revision": revision}


def _counts(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    text = f"keys {', '.join(map(str, list(value)[:5]))}" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
