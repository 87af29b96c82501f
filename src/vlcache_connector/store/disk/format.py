"""The header of an entry's file. Pure bytes, no I/O.

A file is a safetensors file and holds what one rank has of one entry:

    length of the header, 8 bytes | header, JSON, padded with spaces | parts, one behind the other, no holes

The header has one spelling only: the reader spells out what it has understood and demands the very same bytes, which
leaves no room for duplicate keys, overlapping offsets, other number formats. Its first value is a digest of the rest of
it, and it names a digest of each part, so no bit of the file is left unguarded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from blake3 import blake3

from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.types import EntryClass

VERSION = "1"
ALIGNMENT = 64  # of the first part in the file
MAX_HEADER_NBYTES = 2**20  # 200 layers take less than 50 KiB
MAX_PROVENANCE_NBYTES = 2**14
DTYPE_NBYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}

LENGTH_NBYTES = 8
_FIRST = b'{"__metadata__":{"header":"'
_NO_DIGEST = "0" * 64
_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 2**48
_PROVENANCE = "provenance."
_DIGEST = "digest."


@dataclass(frozen=True, slots=True)
class PartSpec:
    """A part without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """All that a file says beside the bytes of its parts."""

    meta: EntryMeta
    rank: int
    world_size: int
    parts: tuple[PartSpec, ...]
    digests: tuple[str, ...]  # of each part, 64 hex digits: see `digests.digest_of`

    @property
    def data_nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def specs_of(parts: Sequence[Part]) -> tuple[PartSpec, ...]:
    """Raises `ValueError` when a part's buffer is not as long as its shape says: a mistake of the caller."""
    specs = tuple(PartSpec(part.name, part.dtype, tuple(part.shape)) for part in parts)
    if len({part.name for part in parts}) != len(parts):
        raise ValueError("two parts have the same name")
    for part, spec in zip(parts, specs, strict=True):
        if part.dtype not in DTYPE_NBYTES or part.buffer.nbytes != spec.nbytes:
            raise ValueError(f"part {part.name}: {part.dtype} {spec.shape} in a buffer of {part.buffer.nbytes} bytes")
    return specs


def encode_header(header: Header) -> bytes:
    """Everything in front of the parts. Raises `ValueError` when the provenance is too long.

    The length does not depend on the digests, so parts can be written while they are still being computed.
    """
    if sum(len(name) + len(text) for name, text in header.meta.provenance.items()) > MAX_PROVENANCE_NBYTES:
        raise ValueError(f"provenance of more than {MAX_PROVENANCE_NBYTES} bytes")
    table: dict[str, object] = {"__metadata__": {"header": _NO_DIGEST, **_metadata(header)}}
    start = 0
    for part in header.parts:
        end = start + part.nbytes
        table[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    raw = text.ljust(-(-(LENGTH_NBYTES + len(text)) // ALIGNMENT) * ALIGNMENT - LENGTH_NBYTES)
    return len(raw).to_bytes(LENGTH_NBYTES, "little") + _sealed(raw)


def decode_header(raw: bytes) -> Header:
    """The header in `raw`, which is all bytes in front of the parts.

    Raises `EntryLostError` unless `encode_header` could have written it. Time and memory depend on the length of `raw`,
    not on what is in it.
    """
    length, text = raw[:LENGTH_NBYTES], raw[LENGTH_NBYTES:]
    if int.from_bytes(length, "little") != len(text):
        raise EntryLostError("its header does not have the length that it says")
    if not text.startswith(_FIRST) or _sealed(text) != text:
        raise EntryLostError("its header is not one of ours, or was altered")
    try:
        header = _understood(json.loads(text))
        spelled = encode_header(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EntryLostError(f"its header makes no sense: {type(error).__name__}") from error
    if spelled != raw:
        raise EntryLostError("its header is not spelled as we spell it")
    return header


def difference(found: Header, wanted: Header) -> str | None:
    """What keeps the file `found` from being the one that is `wanted`; provenance and digests may be any."""
    if found.meta.key != wanted.meta.key:
        return "it belongs to another key"
    if (found.rank, found.world_size) != (wanted.rank, wanted.world_size):
        return f"it belongs to rank {found.rank} of {found.world_size}"
    if found.meta.num_tokens != wanted.meta.num_tokens:
        return f"it has {found.meta.num_tokens} tokens instead of {wanted.meta.num_tokens}"
    if found.meta.entry_class != wanted.meta.entry_class:
        return f"it is of another class, {found.meta.entry_class}"
    if found.parts != wanted.parts:
        return "its tensors have other names, dtypes or shapes"
    return None


def _metadata(header: Header) -> dict[str, str]:
    meta, entry_class = header.meta, header.meta.entry_class
    return {
        "format": "vlcache-entry",
        "version": VERSION,
        "key": meta.key.hex(),
        "kind": entry_class.kind,
        "modality": entry_class.modality,
        "tenant": entry_class.tenant,
        "num_tokens": str(meta.num_tokens),
        "rank": str(header.rank),
        "world_size": str(header.world_size),
        **{_PROVENANCE + name: text for name, text in sorted(meta.provenance.items())},
        **{_DIGEST + part.name: digest for part, digest in zip(header.parts, header.digests, strict=True)},
    }


def _understood(table: dict[str, Any]) -> Header:
    """Raises any error that `decode_header` catches. What is read too generously here is spelled differently."""
    facts = table.pop("__metadata__")
    if (facts["format"], facts["version"]) != ("vlcache-entry", VERSION):
        raise ValueError("another version")
    meta = EntryMeta(
        bytes.fromhex(facts["key"]),
        int(facts["num_tokens"]),
        EntryClass(facts["kind"], facts["modality"], facts["tenant"]),
        {name.removeprefix(_PROVENANCE): text for name, text in facts.items() if name.startswith(_PROVENANCE)},
    )
    parts = tuple(PartSpec(name, row["dtype"], _shape(row["shape"])) for name, row in table.items())
    digests = tuple(_text(facts[_DIGEST + part.name]) for part in parts)
    return Header(meta, int(facts["rank"]), int(facts["world_size"]), parts, digests)


def _shape(numbers: list[object]) -> tuple[int, ...]:
    if len(numbers) > _MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    return tuple(_dimension(number) for number in numbers)


def _dimension(number: object) -> int:
    if type(number) is not int or not 0 <= number <= _MAX_DIMENSION:
        raise ValueError("not a dimension")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _sealed(raw: bytes) -> bytes:
    """`raw` with the digest of all the rest in its place at the start."""
    behind = raw[len(_FIRST) + len(_NO_DIGEST) :]
    digest = blake3(len(raw).to_bytes(LENGTH_NBYTES, "little"))
    digest.update(behind)
    return _FIRST + digest.hexdigest().encode() + behind
