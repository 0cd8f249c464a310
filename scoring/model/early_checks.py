"""Finds mistakes from the configuration of a model, before its weights are read.

Contract: `check_model` refuses settings that would be refused after loading, with the same messages: a block that the model does
not have, a site that its blocks do not have, more dimensions to drop than there are, a limit over the context length. It reads
the configuration and builds the modules without weights (on torch's device "meta") in well under a second, and only if there is
something to check. A model that was passed as an object, or that cannot be built without its weights, is checked when it is
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError
from sparsort.scoring.loading.demo_model import quiet_transformers, resolve_model
from sparsort.scoring.loading.gguf_files import converted_folder
from sparsort.scoring.loading.hub import cached_only
from sparsort.scoring.model.spec import ModelSpec

if TYPE_CHECKING:
    from sparsort.scoring.model.sites import Site


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model without weights.

    Attributes:
        name: the name that the user passed.
        config: the configuration of the text decoder.
        model: the model on the device "meta"; None if it cannot be built there.
    """

    name: str
    config: Any
    model: Any

    def site(self, name: str) -> Site | None:
        """The site of this name, or a `SparsortError` if there is none; None if only the loaded model can tell."""
        from sparsort.scoring.model.backbone import decoder_of, sizes_of
        from sparsort.scoring.model.sites import blocks_of, find_site, norm_candidates

        if self.model is None:
            return None
        decoder = decoder_of(self.model)
        hidden_size, n_layers, _ = sizes_of(self.config, self.name)
        blocks = blocks_of(decoder, n_layers)
        # Only a forward pass reveals which norm is the final one. Here it is enough to know whether there is one.
        norms = norm_candidates(decoder, blocks)
        final_norm = norms[-1] if norms else None
        return find_site(name, blocks=blocks, final_norm=final_norm, hidden_size=hidden_size)

    def width(self, site: Site) -> int:
        """The number of dimensions of the states at a site."""
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
    """Refuse settings that the model does not support.

    Args:
        model: a `ModelSpec` or a name; a model in memory is not checked.
        sites: the sites where states will be read.
        outliers: the outlier rules that will be fitted at each of the sites.
        max_length: a limit in tokens.

    Raises:
        SparsortError: there is no such model; see also `sites.find_site`, `pooling.check_dropped` and `check_max_length`.
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
    """The outline of a named model; None if nothing is known without its weights, as of a GGUF file that is not yet converted.

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
        # Reading the configuration from the GGUF file itself would take as long as converting its tokenizer.
        folder = converted_folder(Path(resolved.folder_or_id) / resolved.gguf_file)
    if folder is None:
        return None
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **options)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    except Exception:  # noqa: BLE001 - a configuration class can raise any error, and loading reports it
        return None
    return Outline(name=name, config=text, model=_built(config, model.trust_remote_code))


def context_of(config: Any) -> int | None:
    """The context length in a configuration, in tokens; None if it has none."""
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if value else None


def check_max_length(max_length: int | None, context: int | None, name: str) -> None:
    """Raise a `SparsortError` for a limit over the context length of a model."""
    if max_length is not None and context is not None and max_length > context:
        raise SparsortError(
            f"max_length is {max_length}, but the context of {name!r} has {context} tokens. Pass at most {context}."
        )


def _built(config: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # Initialising the weights draws random numbers even without memory, and must not change the generator of the caller.
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # noqa: BLE001 - a model class can raise any error, and loading reports it
        return None
