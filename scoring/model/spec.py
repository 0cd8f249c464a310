"""Which model, and how it is loaded and run: the one description that recipes, scorers and commands share.

No torch: a command line reads the options of the fields before anything heavy is imported.
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
    """The fields of `ModelSpec` besides the name, where a function takes them as keywords of its own."""

    dtype: Dtype
    device: str
    token_budget: int | None
    revision: str | None
    trust_remote_code: bool
    tokenizer: Any


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, with how to load and run it.

    Attributes:
        name: hub id, folder, `.gguf` file, "demo" (the embedded model), a transformers model with its `tokenizer`, or a
            `LoadedModel`, for which the other fields but `token_budget` have no meaning.
        dtype: "auto" (bf16 where the hardware has it, else fp32) or a torch dtype's name.
        device: "auto", "cpu", "cuda", "cuda:1", …
        token_budget: tokens of one batch, padding included; None for the device's default. Changes speed, not results.
        revision: hub revision.
        trust_remote_code: run code that ships with the model; never without being asked.
        tokenizer: a transformers tokenizer; None for the model's own.
    """

    name: Any = option(
        "demo", "Hub id, folder, .gguf file, or 'demo'.", panel=MODEL_PANEL, parameter="model", short="-m", kind=str
    )
    _: KW_ONLY
    dtype: Dtype = option("auto", f"auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.", panel=MODEL_PANEL)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …", panel=MODEL_PANEL)
    token_budget: int | None = option(None, "Tokens of one batch. Changes speed only.", panel=MODEL_PANEL)
    revision: str | None = option(None, "Hub revision.", panel=MODEL_PANEL)
    trust_remote_code: bool = option(False, "Run code that ships with the model.", panel=MODEL_PANEL)
    tokenizer: Any = None

    @classmethod
    def of(cls, model: Any, **options: Unpack[ModelOptions]) -> ModelSpec:
        """The model as a spec, with the options given as its fields.

        Args:
            model: a `ModelSpec`, or anything that `name` takes.
            options: fields of the spec.

        Raises:
            TypeError: an option that is not a field. The functions that pass their keywords on rely on this error, so it names
                the keyword and not this class.
        """
        if unknown := sorted(options.keys() - ModelOptions.__annotations__.keys()):
            known = ", ".join(ModelOptions.__annotations__)
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}; the options of a model are {known}")
        return replace(model, **options) if isinstance(model, ModelSpec) else cls(model, **options)

    @property
    def is_named(self) -> bool:
        """Whether the model is one to be loaded by its name, rather than an object in memory."""
        return isinstance(self.name, (str, Path))

    def check(self) -> None:
        """Refuse an unknown dtype, or a token budget below 1, before anything is loaded.

        Raises:
            SparsortError: there is one.
        """
        from sparsort.scoring.loading.load import check_dtype
        from sparsort.scoring.model.batching import check_token_budget

        check_dtype(self.dtype)
        check_token_budget(self.token_budget)

    def load(self) -> LoadedModel:
        """The model and its tokenizer, ready to run.

        Raises:
            SparsortError: see `load_model`.
        """
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
        """The tokenizer alone: the one given, that of a model in memory, or the named model's own.

        Raises:
            SparsortError: see `demo_model.load_tokenizer`.
        """
        from sparsort.scoring.loading.demo_model import load_tokenizer

        if self.tokenizer is not None:
            return self.tokenizer
        if not self.is_named:
            return self.load().tokenizer
        return load_tokenizer(str(self.name), revision=self.revision, trust_remote_code=self.trust_remote_code)
