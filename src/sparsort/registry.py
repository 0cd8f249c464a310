"""Named entries: one table per concept, which all other code asks for names, requirements and help texts.

Contract: a table is a mapping from name to entry, in the order in which help texts and documents list the entries. An entry
states what it needs, reads and costs, and no other source file compares against its name (`tests/test_registry.py`). Nothing
here imports NumPy or torch, so a command line can list the entries before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from sparsort.errors import unknown_choice


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The attributes that the entries of every table have.

    Attributes:
        name: the name that users write.
        help: one line, without the name and without a full stop.
        source: the paper or author that the entry comes from.
        needs: the inputs that the entry requires ("query", "embeddings", "scores", …).
        reads: the settings that the entry reads, in addition to those that every entry of its table reads.
        aliases: names that other papers and programs use, in lower case with underscores; an error suggests the valid name.
    """

    name: str
    help: str
    source: str
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """A table of entries by name, in the order given.

    Args:
        kind: the word for an entry in error messages ("pacing", "selector").
        entries: the entries.

    Raises:
        ValueError: two entries share a name.
    """

    def __init__(self, kind: str, entries: Iterable[E]) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"the table has two entries named {entry.name!r}")
            self._entries[entry.name] = entry

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, name: object) -> E:
        """Return the entry named `name`.

        Raises:
            SparsortError: there is no such entry; the message suggests the nearest name and lists all names.
        """
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        aliases = {alias: entry.name for entry in self._entries.values() for alias in entry.aliases}
        raise unknown_choice(self.kind, name, self._entries, aliases=aliases)

    def names(self, where: Callable[[E], bool] = lambda entry: True) -> tuple[str, ...]:
        """The names of the entries for which `where` holds."""
        return tuple(name for name, entry in self._entries.items() if where(entry))

    def listed(self, where: Callable[[E], bool] = lambda entry: True) -> str:
        """The names for which `where` holds, as one phrase for a help text: "a, b or c"."""
        return listed(self.names(where))

    def needing(self, *inputs: str) -> tuple[str, ...]:
        """The names of the entries that need at least one of these inputs."""
        return self.names(lambda entry: not entry.needs.isdisjoint(inputs))

    def reading(self, *settings: str) -> tuple[str, ...]:
        """The names of the entries that read at least one of these settings."""
        return self.names(lambda entry: not entry.reads.isdisjoint(settings))


def listed(names: Iterable[str]) -> str:
    """Names as one phrase: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def load(place: str, package: str) -> Any:
    """Import the object at "module:name"; tables refer to functions this way so that they load on first use.

    Args:
        place: the module, relative to `package`, and the name in that module.
        package: the package that contains the module.
    """
    module, _, name = place.partition(":")
    return getattr(import_module(f"{package}.{module}"), name)
