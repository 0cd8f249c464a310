"""The settings that load and run a model (`ModelSpec`), which recipes, scorers and commands share.

This module does not import torch, because the command line makes its options from the fields before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from sparsort.options import option
from sparsort.scoring.loading.dtypes import DTYPES, Dtype

if TYPE_CHECKING:
    from sparsort.scoring.loading.load import LoadedModel

MODEL_PANEL = "Model"


class ModelOptions(TypedDict, total=False):
    """The fields of `ModelSpec` except the name, for functions that accept them as keywords."""

    dtype: Dtype
    device: str
    token_budget: int | None
    revision: str | None
    trust_remote_code: bool
    tokenizer: Any


@dataclass(frozen=True)
class ModelSpec:
    """A model, and the settings to load and run it.

    Attributes:
        name: hub id, folder, `.gguf` file, "demo" (the embedded model), a transformers model with its `tokenizer`, or a
            `LoadedModel`, for which all other fields except `token_budget` are ignored.
        dtype: "auto" (bf16 if the hardware has it, otherwise fp32) or the name of a torch dtype.
        device: "auto", "cpu", "cuda", "cuda:1", …
        token_budget: tokens of one batch, including padding; None for the default of the device. It changes the speed,
            and results only by rounding.
        revision: hub revision.
        trust_remote_code: run code that comes with the model.
        tokenizer: a transformers tokenizer; None for that of the model.
    """

    name: Any = option(
        "demo", "Hub id, folder, .gguf file, or 'demo'.", panel=MODEL_PANEL, parameter="model", short="-m", kind=str
    )
    _: KW_ONLY
    dtype: Dtype = option("auto", f"auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.", panel=MODEL_PANEL)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …", panel=MODEL_PANEL)
    token_budget: int | None = option(
        None, "Tokens of one batch. Changes the speed, and results only by rounding.", panel=MODEL_PANEL
    )
    revision: str | None = option(None, "Hub revision.", panel=MODEL_PANEL)
    trust_remote_code: bool = option(False, "Run code that ships with the model.", panel=MODEL_PANEL)
    tokenizer: Any = None

    @classmethod
    def of(cls, model: Any, **options: Unpack[ModelOptions]) -> ModelSpec:
        """The model as a spec, with the given options as its fields.

        Args:
            model: a `ModelSpec`, or any value that `name` accepts.
            options: fields of the spec.

        Raises:
            TypeError: an option is not a field. Public functions pass their keywords on to this one, so the message names the
                keyword and not this class.
        """
        if unknown := sorted(options.keys() - ModelOptions.__annotations__.keys()):
            known = ", ".join(ModelOptions.__annotations__)
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}; the options of a model are {known}")
        return replace(model, **options) if isinstance(model, ModelSpec) else cls(model, **options)

    @property
    def is_named(self) -> bool:
        """Whether the model is given by a name or path, and not as an object in memory."""
        return isinstance(self.name, (str, Path))

    def check(self) -> None:
        """Refuse an unknown dtype, or a token budget below 1, before anything is loaded."""
        from sparsort.scoring.loading.load import check_dtype
        from sparsort.scoring.model.batching import check_token_budget

        check_dtype(self.dtype)
        check_token_budget(self.token_budget)

    def load(self) -> LoadedModel:
        """Load the model and its tokenizer; see `load_model` for the errors."""
        from sparsort.scoring.loading.load import LoadedModel, load_model

        self.check()
        if isinstance(self.name, LoadedModel):
            return self.name
        return load_model(
            self.name,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def load_tokenizer(self) -> Any:
        """Load only the tokenizer; see `demo_model.load_tokenizer` for the errors."""
        from sparsort.scoring.loading.demo_model import load_tokenizer

        if self.tokenizer is not None:
            return self.tokenizer
        if not self.is_named:
            return self.load().tokenizer
        return load_tokenizer(str(self.name), revision=self.revision, trust_remote_code=self.trust_remote_code)
