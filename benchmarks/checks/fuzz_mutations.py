"""Changes to the bytes, values and files of a small folder, as plain lists that a corpus can store.

Contract: `MUTATIONS` is a hypothesis strategy of lists of mutations. `apply` is a pure function from the files of a folder and
such a list to other files. Positions and choices are integers, taken modulo the number of options, so that a list fits any
folder. A sealed JSON file is sealed again after an edit, so that readers see wrong types under a correct digest.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from sparsort.storage.integrity import SEAL, is_sealed, seal

Files = dict[str, bytes]
Mutation = Sequence[Any]

# JSON values to put where another value is expected.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        1.5,
        -0.0,
        2**31,
        2**63,
        2**64,
        -(2**63) - 1,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "a", "\0", "\ud800", "..", "/", "../x", "9" * 400, "nan", "{", "{text", "{a.b[0]}", "x" * 3000, "ü‮"),
    *([], {}, [[]], [None], {"": None}, [1, 2], ["a"], {"a": 1}, [{}], [0.5] * 7, {"0": {"0": 1}}),
)
# Pieces of the formats' own syntax, and bytes that break readers of text.
TOKENS: tuple[bytes, ...] = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b",",
        b";",
        b"\t",
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"\\",
        b":",
        b"=",
        b"#",
        b"\x1a",
    ),
    *(
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xff\xfe\0\0",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\x80",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\xe2\x80\xa8",
    ),
    *(
        b"null",
        b"NaN",
        b"Infinity",
        b"-",
        b"1e999",
        b"9" * 400,
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"[[a]]",
        b"a = 1\n",
    ),
    *(
        b"PAR1",
        b"ARROW1",
        b"\x1f\x8b\x08\0",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\0" * 8,
        b"\x80\x80\x80\x80\x80\x01",
    ),
)
# Contents of whole files, of another kind or of no kind.
CONTENTS: tuple[bytes, ...] = (
    *(
        b"",
        b" \n\t\n",
        b"\0" * 64,
        b"\xff\xfe",
        b"\xff\xfe\0\0",
        b"null",
        b"[]",
        b"{}",
        b"[[]]",
        b'""',
        b"1",
        b"[null]",
        b"{\n}",
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'{"id": 1}\n{"id": 1}',
        b"PAR1",
        b"PAR1PAR1",
        b"ARROW1\0\0",
        b"{" * 50,
    ),
    *(
        '{"a": "ü"}'.encode("utf-16"),
        '{"a": "ü"}'.encode("utf-32"),
        '{"a": 1}'.encode("utf-16-le"),
        b"a;b\n1,5;2",
        b"a,a\n1,2",
    ),
    *(
        gzip.compress(b"", mtime=0),
        gzip.compress(b"[1]", mtime=0),
        b"\x1f\x8b",
        b'{"data": [{"a": 1}]}',
        b'{"a": [1], "b": {}}',
    ),
    *(
        b'{"a": [1], "b": [1, 2]}',
        b'{"0": {"0": 1}}',
        b'{\n"a": 1\n}\n{\n"a": 2\n}',
        b"\r",
        b'"',
        b'a\n"',
        b"[a]\n[a]",
    ),
)

# Places are taken modulo the length of a file, so that one list of mutations applies to files of any size.
_place = st.integers(0, 2**32 - 1)
_file = st.integers(0, 30)
_KINDS: tuple[Any, ...] = (
    st.tuples(st.just("flip"), _file, _place, st.integers(0, 7)),
    st.tuples(st.just("cut"), _file, _place),
    st.tuples(st.just("delete"), _file, _place, st.integers(1, 40)),
    st.tuples(st.just("repeat"), _file, _place, st.integers(1, 40)),
    st.tuples(st.just("insert"), _file, _place, st.integers(0, len(TOKENS) - 1)),
    st.tuples(st.just("overwrite"), _file, _place, st.integers(0, len(TOKENS) - 1)),
    st.tuples(st.just("bytes"), _file, _place, st.binary(min_size=1, max_size=6).map(list)),
    st.tuples(st.just("content"), _file, st.integers(0, len(CONTENTS) - 1)),
    st.tuples(st.just("swap"), _file, _file),
    st.tuples(st.just("remove"), _file),
    st.tuples(st.just("number"), _file, _place, st.integers(0, len(VALUES) - 1)),
)
_EDITS: tuple[Any, ...] = (
    st.tuples(st.just("value"), _file, _place, st.integers(0, len(VALUES) - 1)),
    st.tuples(st.just("key"), _file, _place),
    st.tuples(st.just("rename"), _file, _place, st.integers(0, len(VALUES) - 1)),
)
# Half of all mutations edit values, because digests and parsers find most of the others.
MUTATIONS = st.lists(st.one_of(st.one_of(*_KINDS), st.one_of(*_EDITS)), min_size=1, max_size=4)


def apply(files: Mapping[str, bytes], mutations: Sequence[Mutation]) -> Files:
    """The files of a folder after the mutations, applied one after the other."""
    found = dict(files)
    for name, file, *rest in mutations:
        if not found:
            break
        # Sorted, so that a number names the same file in every run.
        path = sorted(found)[file % len(found)]
        if name == "remove":
            del found[path]
        elif name == "swap":
            other = sorted(found)[rest[0] % len(found)]
            # A file in the place of another is valid in itself, and only the reader's checks of identity
            # find it.
            found[path], found[other] = found[other], found[path]
        elif name in _STRUCTURED:
            found[path] = _edited(found[path], name, rest)
        else:
            found[path] = _BYTES[name](found[path], *rest)
    return found


def _at(content: bytes, place: int) -> int:
    return place % (len(content) + 1)


def _flip(content: bytes, place: int, bit: int) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    return bytes(changed)


def _put(content: bytes, place: int, piece: bytes, removed: int) -> bytes:
    begin = _at(content, place)
    return content[:begin] + piece + content[begin + removed :]


def _repeat(content: bytes, place: int, length: int) -> bytes:
    begin = _at(content, place)
    return _put(content, begin, content[begin : begin + length] * 2, length)


def _number(content: bytes, place: int, value: int) -> bytes:
    """Another value for the TOML or JSON literal that follows the first `=` or `:` after a place."""
    # TOML and JSON separate a key from its value by one of these.
    begin = next((at for at in range(_at(content, place), len(content)) if content[at] in b"=:"), None)
    if begin is None:
        return content
    end = next((at for at in range(begin, len(content)) if content[at] in b",\n}"), len(content))
    return content[: begin + 1] + b" " + _json(VALUES[value]) + content[end:]


_BYTES: Mapping[str, Callable[..., bytes]] = {
    "flip": _flip,
    "cut": lambda content, place: content[: _at(content, place)],
    "delete": lambda content, place, length: _put(content, place, b"", length),
    "repeat": _repeat,
    "insert": lambda content, place, token: _put(content, place, TOKENS[token], 0),
    "overwrite": lambda content, place, token: _put(content, place, TOKENS[token], len(TOKENS[token])),
    "bytes": lambda content, place, piece: _put(content, place, bytes(piece), len(piece)),
    "content": lambda _content, which: CONTENTS[which],
    "number": _number,
}


def _edited(content: bytes, name: str, rest: Sequence[int]) -> bytes:
    """Change one value of JSON, of one line of JSON lines, or of a safetensors header; return other content unchanged."""
    # A safetensors file begins with the length of its JSON header in 8 bytes.
    length = int.from_bytes(content[:8], "little")
    if 0 < length < len(content) and content[8:9] == b"{":
        header = _edited(content[8 : 8 + length], name, rest)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    # Content is JSON lines if its first line is a complete object.
    lines = content.split(b"\n")
    if len(lines) > 1 and len(lines[0]) > 1 and lines[0].endswith(b"}"):
        line = rest[0] % len(lines)
        lines[line] = _edited(lines[line], name, rest)
        return b"\n".join(lines)
    try:
        value = json.loads(content)
    # An earlier mutation of the list may have broken the JSON, or nested it too deeply for the parser.
    except (ValueError, RecursionError):
        return content
    # Only a file whose seal is still valid is sealed again; a broken seal stays broken.
    sealed = isinstance(value, dict) and SEAL in value and is_sealed(value)
    spots = list(_spots(value))
    if not spots:
        return content
    holder, key = spots[rest[0] % len(spots)]
    _STRUCTURED[name](holder, key, *rest[1:])
    return _json(seal(value) if sealed and isinstance(value, dict) else value)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value, as its container and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _spots(value[key])


def _set(holder: Any, key: Any, which: int) -> None:
    holder[key] = VALUES[which]


def _drop(holder: Any, key: Any) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, which: int) -> None:
    value = holder[key]
    if isinstance(holder, dict):
        del holder[key]
        holder[str(VALUES[which])] = value
    else:
        # A list has no keys, so a rename inserts a value and shifts the others.
        holder.insert(key, VALUES[which])


_STRUCTURED: Mapping[str, Callable[..., None]] = {"value": _set, "key": _drop, "rename": _rename}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
