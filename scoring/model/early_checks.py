"""Mistakes that a model's configuration shows, found before its weights are read.

Contract: `check_model` refuses what would be refused after loading, with the same words: a block that the model does not have, a
site that its blocks do not have, more dimensions to drop than there are, a limit over its context. It reads the configuration
and builds the modules without weights (torch's device "meta"), in well under a second, and only where there is something to
check. A model that was passed as an object, or that cannot be built without its weights, is checked when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError
from sparsort.scoring.loading.demo_model import quiet_transformers, resolve_model
from sparsort.scoring.loading.gguf_files import kept_folder
from sparsort.scoring.loading.hub import cached_only
from sparsort.scoring.model.spec import ModelSpec

if TYPE_CHECKING:
    from sparsort.scoring.model.sites import Site


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model without weights.

    Attributes:
        name: as the user gave it.
        config: the configuration of its text decoder.
        model: the model on the device "meta"; None if it cannot be built there.
    """

    name: str
    config: Any
    model: Any

    def site(self, name: str) -> Site | None:
        """The site of this name; None if that is only known of a loaded model.

        Raises:
            SparsortError: the model has no such site.
        """
        from sparsort.scoring.model.backbone import decoder_of, sizes_of
        from sparsort.scoring.model.sites import blocks_of, find_site, norm_candidates

        if self.model is None:
            return None
        decoder = decoder_of(self.model)
        hidden_size, n_layers, _ = sizes_of(self.config, self.name)
        blocks = blocks_of(decoder, n_layers)
        # Which norm is the final one shows in a forward pass; whether there is any shows here.
        norms = norm_candidates(decoder, blocks)
        final_norm = norms[-1] if norms else None
        return find_site(name, blocks=blocks, final_norm=final_norm, hidden_size=hidden_size)

    def width(self, site: Site) -> int:
        """Number of dimensions of a site's states."""
        hidden = int(self.config.hidden_size)
        if not site.name.startswith("mlp"):
            return hidden
        return int(next(site.module.parameters()).numel() // hidden)


def check_model(
    model: Any,
    *,
    sites: Sequence[str] = (),
    outliers: Sequence[str] = (),
    max_length: int | None = None,
) -> None:
    """Refuse what a model does not have.

    Args:
        model: a `ModelSpec` or a name; a model in memory is not looked at.
        sites: where states will be read.
        outliers: the outlier rules that will be fitted at each of the sites.
        max_length: a limit in tokens.

    Raises:
        SparsortError: see `sites.find_site`, `pooling.check_dropped` and `check_max_length`; or there is no such model.
    """
    dropped = [rule for rule in outliers if rule.startswith("drop:")]
    special = [site for site in sites if site != "pre_norm"]
    spec = ModelSpec.of(model)
    if not spec.is_named or not (special or dropped or max_length is not None):
        return
    outline = outline_of(spec)
    if outline is None:
        return
    check_max_length(max_length, context_of(outline.config), outline.name)
    from sparsort.scoring.scorers.pooling import check_dropped

    for name in sites if dropped else special:
        site = outline.site(name)
        if site is not None:
            for rule in dropped:
                check_dropped(rule, outline.width(site))


def outline_of(model: ModelSpec | str) -> Outline | None:
    """What is known of a named model without its weights; None if that is nothing, as of a GGUF file that is not converted yet.

    Raises:
        SparsortError: there is no such model.
    """
    model = ModelSpec.of(model)
    name = str(model.name)
    resolved = resolve_model(name)
    folder: str | Path | None = resolved.folder_or_id
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if resolved.is_hub_id:
        options["local_files_only"] = cached_only(resolved.folder_or_id, revision=model.revision)
    if resolved.gguf_file:
        # Reading the configuration from the file itself takes as long as converting its tokenizer.
        folder = kept_folder(Path(resolved.folder_or_id) / resolved.gguf_file)
    if folder is None:
        return None
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **options)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    except Exception:  # noqa: BLE001 - each class checks its own fields in its own way, and loading reports what is wrong
        return None
    return Outline(name=name, config=text, model=_built(config, model.trust_remote_code))


def context_of(config: Any) -> int | None:
    """The context length of a configuration, in tokens; None when it does not say."""
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if value else None


def check_max_length(max_length: int | None, context: int | None, name: str) -> None:
    """Refuse a limit over the context length of a model.

    Raises:
        SparsortError: it is over.
    """
    if max_length is not None and context is not None and max_length > context:
        raise SparsortError(
            f"max_length is {max_length}, but {name!r} was made for {context} tokens. Pass at most {context}."
        )


def _built(config: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # noqa: BLE001 - as above
        return None
