"""The settings that convert a row to a text (`PromptSpec`) and read the rows of a file (`DataSpec`).

Recipes, scorers and commands share these classes. This module does not import torch, because the command line makes its options
from the fields before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from sparsort.errors import SparsortError
from sparsort.options import names_in, option, unescape
from sparsort.scoring.prompts.types import PromptWriter, Truncation, Turns

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource
    from sparsort.scoring.prompts.functions import PromptFunction
    from sparsort.scoring.prompts.prompt import Prompt

TEXT_PANEL = "Text"


class PromptOptions(TypedDict, total=False):
    """The fields of `PromptSpec` except the template, for functions that accept them as keywords."""

    answer: str | None
    messages: str | None
    system: str | None
    chat: bool
    truncation: Truncation
    max_length: int | None


@dataclass(frozen=True)
class PromptSpec:
    """The text of a row that the model reads.

    Attributes:
        template: a format string over the columns such as `"Question: {question}\\nAnswer:"`; chat turns
            `[{"role": "user", "content": "{question}"}, …]`; a function from a row to its text or chat turns (see
            `prompts.functions`); or a `Prompt`.
        answer: format string of the answer after the prompt; None to read the prompt alone.
        messages: instead of a template, the column of whole conversations (see `prompts.conversations`). The last assistant
            turn is the answer, and the model's chat template is applied.
        system: system turn; with `chat`.
        chat: put the prompt into the model's chat template.
        truncation: treatment of a text over the limit. "error" leaves the row unscored with a reason; "left" and "right" cut
            that end of the prompt and count the tokens that were cut.
        max_length: limit in tokens; None for the context length of the model.
    """

    template: str | Turns | PromptWriter | Prompt | None = option(
        None,
        r"Format string over the columns; \n and \t are read as newline and tab.",
        panel=TEXT_PANEL,
        parameter="prompt",
        short="-p",
        kind=str | None,
        read=unescape,
    )
    _: KW_ONLY
    answer: str | None = option(
        None, "Format string of the answer that follows the prompt.", panel=TEXT_PANEL, short="-a", read=unescape
    )
    messages: str | None = option(
        None,
        "Column of whole conversations (ShareGPT, OpenAI, TRL) instead of --prompt; the last assistant turn is the answer.",
        panel=TEXT_PANEL,
    )
    system: str | None = option(None, "System turn; with --chat.", panel=TEXT_PANEL, read=unescape)
    chat: bool = option(False, "Use the model's chat template.", panel=TEXT_PANEL)
    truncation: Truncation = option(
        "error", "Treatment of a text over the limit: error, left or right.", panel=TEXT_PANEL
    )
    max_length: int | None = option(None, "Limit in tokens [default: the model's context].", panel=TEXT_PANEL)

    @classmethod
    def of(
        cls, prompt: str | Turns | PromptWriter | Prompt | PromptSpec | None, **options: Unpack[PromptOptions]
    ) -> PromptSpec:
        """The prompt as a spec.

        Args:
            prompt: a template, a function, or a spec.
            options: the other fields. If `prompt` is a spec, all of them must have their default values.

        Raises:
            SparsortError: a spec was given together with one of its fields.
        """
        if not isinstance(prompt, PromptSpec):
            return cls(prompt, **options)
        defaults = {field.name: field.default for field in fields(cls)}
        if given := [name for name, value in options.items() if value != defaults[name]]:
            raise SparsortError(f"the prompt is a PromptSpec, which has its own {given[0]}. Do not pass {given[0]}=.")
        return prompt

    @property
    def for_demonstrations(self) -> str:
        """The template, for a prompt that consists of demonstrations and a query.

        Raises:
            SparsortError: the template is not a format string (see `as_column`), or there is a setting that such a prompt
                does not have.
        """
        unsupported = {"messages": None, "truncation": "error", "max_length": None}
        given = [name for name, default in unsupported.items() if getattr(self, name) != default]
        if given or not isinstance(self.template, str):
            problem = f"{given[0]} was given" if given else f"the prompt is {self.template!r:.80}"
            raise SparsortError(
                f"{problem}; demonstrations are inserted into a format string, such as 'Question: {{question}}\\nAnswer:', and a "
                "prompt with demonstrations is never cut. Pass only a format string."
            )
        return self.template

    def as_column(self) -> tuple[PromptSpec, PromptFunction | None]:
        """This spec for code that fills templates: the text of a prompt function is shown from a column that the function adds.

        Returns:
            The spec, and the function whose `add_column` adds the column to the rows; None if the template is not a function.
        """
        from sparsort.scoring.prompts.functions import PROMPT_TEMPLATE, function_of

        function = function_of(self.template)
        return (self if function is None else replace(self, template=PROMPT_TEMPLATE)), function

    def read(self) -> Prompt | None:
        """The prompt, see `Prompt.given`; None if neither a template nor a column was given."""
        from sparsort.scoring.prompts.prompt import Prompt

        return Prompt.given(
            self.template, messages=self.messages, answer=self.answer, system=self.system, chat=self.chat
        )


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The settings for reading the rows of a file.

    Attributes:
        id_column: the column with the ids of the rows. None: the column "id" if there is one, otherwise the position.
        columns: names of the columns of a CSV or TSV file without a header.
    """

    id_column: str | None = option(
        None, "Column that identifies a row [default: id, else the position].", panel=TEXT_PANEL
    )
    columns: Sequence[str] | None = option(
        None,
        "Comma-separated names of the columns of a .csv or .tsv file without a header.",
        panel=TEXT_PANEL,
        kind=str | None,
        read=names_in,
    )

    def open(self, data: Any, *, content: Sequence[str] | None = None) -> RowSource:
        """Open `data` as rows; see `open_rows`."""
        from sparsort.scoring.data.rows import open_rows

        return open_rows(data, id_column=self.id_column, content=content, columns=self.columns)
