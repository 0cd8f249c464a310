"""Few-shot documents of lm-evaluation-harness, chosen and ordered by sparsort.

Contract: `sampler(options)` is a `ContextSampler` class. A task's YAML takes it as `fewshot_config.sampler`, either by
`!function FILE.NAME` from a Python file next to the YAML, or by a name given to `register`. The harness is not patched.

The harness passes the document of the query to a sampler only if the few-shot split is the test split. Without it, nothing can
keep the query out of its own demonstrations, so the sampler refuses, unless `allow_leaks` is set. `QueryTask`, as the task's
`class`, always passes it.

Of the harness's two caches, `--use_cache` stores answers under the whole prompt, so orders do not mix. `--cache_requests` stores
prompts under the name of the task and the number of shots. It would return the prompts of another order, so `QueryTask` does
without it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sparsort.errors import SparsortError
from sparsort.extras import need
from sparsort.recipes.adapters.demonstrations import DemoChooser, DemoOptions

need("lm_eval", "lm-eval", "few-shot samplers of lm-evaluation-harness")

from lm_eval.api.samplers import SAMPLER_REGISTRY, ContextSampler  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

__all__ = ["DemoOptions", "QueryTask", "SparsortSampler", "register", "sampler"]

Document = Mapping[str, Any]
# The command of the harness shows the records of its own loggers only.
_LOG = logging.getLogger("lm_eval.sparsort")


class SparsortSampler(ContextSampler):  # type: ignore[misc]
    """A `ContextSampler` that chooses and orders demonstrations by `options`; made by `sampler`.

    Attributes:
        options: how to choose and order. Without a seed, the harness's few-shot seed is used, so every document has the same
            draw of demonstrations.
        query: the document of the query, which `QueryTask` sets.
    """

    options: ClassVar[DemoOptions]

    def __init__(
        self, df: Sequence[Document] | None = None, *, rnd: int | None = None, fewshot_indices: list[int] | None = None
    ) -> None:
        super().__init__(df, rnd=rnd, fewshot_indices=fewshot_indices)
        self.query: Document | None = None
        self._seed = rnd or 0
        self._chooser: DemoChooser | None = None

    def sample(
        self, n: int, eval_doc: Document | None = None, df: Sequence[Document] | None = None, **_: Any
    ) -> list[Document]:
        """The n demonstrations of `eval_doc`, first to last.

        Raises:
            SparsortError: there are too few documents, a score is missing, or the document of the query is not known.
        """
        if df:
            self.replace_df(df)
        if n == 0:
            return []
        query = self.query if eval_doc is None else eval_doc
        if query is None and not self.options.allow_leaks:
            raise SparsortError(
                "lm-evaluation-harness did not say which document is being asked (it does only where fewshot_split is "
                "the test split), so nothing keeps that document out of its own demonstrations. Add to the task's YAML: "
                f"class: !function {__name__}.QueryTask, or set allow_leaks=True."
            )
        documents = self.fewshot_docs()
        if self._chooser is None:
            self._chooser = DemoChooser(documents, self.options)
        return [documents[position] for position in self._chooser.choose(query, n, seed=self._seed)]

    def set_rnd(self, rnd: int | None) -> SparsortSampler:
        """Take the harness's few-shot seed."""
        super().set_rnd(rnd)
        self._seed = rnd or 0
        return self

    def replace_df(self, df: Sequence[Document]) -> SparsortSampler:
        """Choose from other documents."""
        super().replace_df(df)
        self._chooser = None
        return self


class QueryTask(ConfigurableTask):  # type: ignore[misc]
    """A task that is configured by its YAML, and passes the document of each query to its `SparsortSampler`.

    In YAML: `class: !function sparsort.recipes.adapters.lm_eval.QueryTask`.
    """

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"}, **options)

    def fewshot_context(self, doc: Document, num_fewshot: int, **options: Any) -> Any:
        """The demonstrations of `doc`, followed by its prompt."""
        if isinstance(getattr(self, "sampler", None), SparsortSampler):
            self.sampler.query = doc
        return super().fewshot_context(doc, num_fewshot, **options)

    def build_all_requests(self, *, cache_requests: bool = False, **options: Any) -> None:
        """Build the prompts of all documents, never from the cache of prompts if they have demonstrations of ours."""
        if cache_requests and self.config.num_fewshot and isinstance(self.sampler, SparsortSampler):
            _LOG.warning(
                "%s: the prompts are built again despite cache_requests (--cache_requests), which does not record the order of "
                "demonstrations.",
                self.config.task,
            )
            cache_requests = False
        super().build_all_requests(cache_requests=cache_requests, **options)


def sampler(options: DemoOptions) -> type[SparsortSampler]:
    """A sampler class for `fewshot_config.sampler`, in YAML by `!function` or in a configuration that is a dict."""
    return type("SparsortSampler", (SparsortSampler,), {"options": options, "__doc__": SparsortSampler.__doc__})


def register(options: DemoOptions, name: str = "sparsort") -> None:
    """Register a sampler in the harness, so that a YAML can refer to it with `sampler: NAME`.

    Call this before the tasks are built, in the program that calls `lm_eval.simple_evaluate`. A second registration of the same
    name replaces the first.

    Raises:
        SparsortError: another sampler has this name.
    """
    taken = SAMPLER_REGISTRY.get(name)
    if taken is not None and not issubclass(taken, SparsortSampler):
        raise SparsortError(
            f"lm-evaluation-harness already has a sampler called {name!r} ({taken.__name__}). Choose another name."
        )
    SAMPLER_REGISTRY[name] = sampler(options)
