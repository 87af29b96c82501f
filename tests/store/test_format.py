"""The header of an entry's file: golden bytes, what the safetensors library says to it, and hostile ones."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import safe_open

from store.entries import KV, bytes_of, filled, meta_of
from vlcache_connector.store.base import EntryLostError, EntryMeta, Part
from vlcache_connector.store.digests import PIECE_NBYTES
from vlcache_connector.store.disk.format import (
    ALIGNMENT,
    MAX_HEADER_NBYTES,
    Header,
    PartSpec,
    decode_header,
    difference,
    encode_header,
    specs_of,
)
from vlcache_connector.store.disk.tier import DiskTier
from vlcache_connector.types import EntryClass

START = b'{"__metadata__":{"header":"'
GOLDEN = Header(
    EntryMeta(bytes(range(32)), 2, EntryClass("kv", "image", "00ff" * 4), {"vllm": "0.32.0", "a": "\u00e9"}),
    rank=1,
    world_size=2,
    parts=(PartSpec("layer.0", "BF16", (2, 2, 1, 8)), PartSpec("positions", "I32", (3, 2))),
    digests=("ab" * 32, "cd" * 32),
)
GOLDEN_TEXT = (
    b'{"__metadata__":{"header":"b169982a320f989c2ac0f18da8ac42019fb437a69e643abb94f66cd778579772",'
    b'"format":"vlcache-entry","version":"1",'
    b'"key":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",'
    b'"kind":"kv","modality":"image","tenant":"00ff00ff00ff00ff","num_tokens":"2","rank":"1","world_size":"2",'
    b'"provenance.a":"\\u00e9","provenance.vllm":"0.32.0",'
    b'"digest.layer.0":"' + b"ab" * 32 + b'","digest.positions":"' + b"cd" * 32 + b'"},'
    b'"layer.0":{"dtype":"BF16","shape":[2,2,1,8],"data_offsets":[0,64]},'
    b'"positions":{"dtype":"I32","shape":[3,2],"data_offsets":[64,88]}}'
)


def sealed(text: bytes) -> bytes:
    """A header behind its length, with the right digest of itself: what an attacker would write."""
    assert text.startswith(START)
    behind = text[len(START) + 64 :]
    digest = blake3(struct.pack("<Q", len(text)) + behind).hexdigest().encode()
    return struct.pack("<Q", len(text)) + START + digest + behind


def table_of(header: Header) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(encode_header(header)[8:])
    return table


def raw_of(table: object) -> bytes:
    text = json.dumps(table, separators=(",", ":")).encode()
    return sealed(text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8))


def test_golden_bytes() -> None:
    """A file of today is read by every later version, or the version number in it changes."""
    golden = struct.pack("<Q", 696) + GOLDEN_TEXT.ljust(696)
    assert encode_header(GOLDEN) == golden
    assert decode_header(golden) == GOLDEN


def test_the_safetensors_library_reads_an_entry_s_file(tmp_path: Path) -> None:
    meta, parts = meta_of(1), filled(meta_of(1))
    DiskTier(tmp_path, 10**6, world_size=1).write(meta, parts)
    (path,) = tmp_path.glob("??/*")
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(part.name for part in parts[0])
        for part in parts[0]:
            tensor = file.get_tensor(part.name)
            assert (tuple(tensor.shape), tensor.dtype) == (
                part.shape,
                {"BF16": torch.bfloat16, "I32": torch.int32}[part.dtype],
            )
            assert bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) == part.buffer
        facts = file.metadata()
    assert facts["key"] == meta.key.hex()
    assert facts["provenance.model"] == "a model"
    assert facts["num_tokens"] == "4"


def test_digests_are_blake3_of_the_gmac_of_each_piece(tmp_path: Path) -> None:
    """Anybody can verify a file with a few lines; so does this test."""
    meta = EntryMeta(bytes(32), 1, EntryClass("embedding", "image"))
    content = bytes(range(251)) * (2 * PIECE_NBYTES // 251 + 1)
    part = Part("embedding", "U8", (len(content),), memoryview(bytearray(content)))
    DiskTier(tmp_path, 10**8, world_size=1).write(meta, [[part]])
    (path,) = tmp_path.glob("??/*")
    raw = path.read_bytes()
    facts = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    pieces = [content[i : i + PIECE_NBYTES] for i in range(0, len(content), PIECE_NBYTES)]
    assert len(pieces) == 3
    key = blake3(meta.key, derive_key_context="vlcache-connector 2026 digests of pieces").digest()[:16]
    tags = [AESGCM(key).encrypt(bytes(12), b"", piece) for piece in pieces]
    assert facts["digest.embedding"] == blake3(b"".join(tags)).hexdigest()
    assert raw.endswith(content)


def test_parts_begin_at_a_multiple_of_64() -> None:
    for length in range(130):
        header = replace(GOLDEN, meta=replace(GOLDEN.meta, provenance={"note": "x" * length}))
        assert len(encode_header(header)) % 64 == 0


def test_the_length_of_a_header_does_not_depend_on_digests() -> None:
    assert len(encode_header(replace(GOLDEN, digests=("00" * 32,) * 2))) == len(encode_header(GOLDEN))


def test_every_altered_byte_of_a_header_is_noticed() -> None:
    raw = encode_header(GOLDEN)
    for i in range(len(raw)):
        for bit in range(8):
            altered = bytearray(raw)
            altered[i] ^= 1 << bit
            with pytest.raises(EntryLostError):
                decode_header(bytes(altered))


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    table = table_of(GOLDEN)
    edit(table)
    return raw_of(table)


def with_text(old: bytes, new: bytes) -> bytes:
    text = encode_header(GOLDEN)[8:].rstrip()
    assert old in text
    text = text.replace(old, new, 1)
    return sealed(text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8))


HOSTILE = {
    "a huge dimension": edited(lambda t: t["layer.0"].update(shape=[2**62, 2**62])),
    "huge offsets": edited(lambda t: t["layer.0"].update(data_offsets=[0, 2**63])),
    "overlapping offsets": edited(lambda t: t["positions"].update(data_offsets=[0, 24])),
    "a hole between parts": edited(lambda t: t["positions"].update(data_offsets=[72, 96])),
    "a negative dimension": edited(lambda t: t["layer.0"].update(shape=[-2, -2, 1, 8])),
    "a dimension that is true": edited(lambda t: t["layer.0"].update(shape=[2, 2, True, 8])),
    "a fraction": edited(lambda t: t["layer.0"].update(shape=[2.0, 2, 1, 8])),
    "many dimensions": edited(lambda t: t["layer.0"].update(shape=[1] * 50_000)),
    "a shape that is a text": edited(lambda t: t["layer.0"].update(shape="2218")),
    "an unknown dtype": edited(lambda t: t["layer.0"].update(dtype="F128")),
    "a dtype that is a list": edited(lambda t: t["layer.0"].update(dtype=["BF16"])),
    "a part that is no table": edited(lambda t: t.update({"layer.0": 7})),
    "no digest": edited(lambda t: t["__metadata__"].pop("digest.layer.0")),
    "a digest that is a number": edited(lambda t: t["__metadata__"].update({"digest.layer.0": 7})),
    "a digest of no part": edited(lambda t: t["__metadata__"].update({"digest.layer.9": "00" * 32})),
    "a fact nobody asked for": edited(lambda t: t["__metadata__"].update(more="x")),
    "no key": edited(lambda t: t["__metadata__"].pop("key")),
    "a key that is not hex": edited(lambda t: t["__metadata__"].update(key="zz" * 32)),
    "a key in capitals": edited(lambda t: t["__metadata__"].update(key="AB" * 32)),
    "tokens that are a number": edited(lambda t: t["__metadata__"].update(num_tokens=2)),
    "tokens in other digits": edited(lambda t: t["__metadata__"].update(num_tokens="\u0662")),
    "tokens with 5000 digits": edited(lambda t: t["__metadata__"].update(num_tokens="9" * 5000)),
    "another version": edited(lambda t: t["__metadata__"].update(version="2")),
    "another format": edited(lambda t: t["__metadata__"].update(format="pt")),
    "provenance without end": edited(lambda t: t["__metadata__"].update({"provenance.z": "x" * 2**17})),
    "a fact twice": with_text(b'"kind":"kv",', b'"kind":"kv","kind":"kv",'),
    "a part twice": with_text(
        b'"positions":{', b'"positions":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"positions":{'
    ),
    "NaN": with_text(b"[0,64]", b"[0,NaN]"),
    "infinity": with_text(b"[0,64]", b"[0,1e999]"),
    "a number of 100000 digits": with_text(b"[0,64]", b"[0," + b"9" * 100_000 + b"]"),
    "deep nesting": with_text(b"[0,64]", b"[" * 100_000 + b"]" * 100_000),
    "deep nesting of tables": with_text(b"[0,64]", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a space too many": with_text(b'"kind":', b'"kind": '),
    "text behind the table": with_text(b"[64,88]}}", b"[64,88]}} {}"),
    "no end": with_text(b"[64,88]}}", b"[64,88]"),
    "not UTF-8": with_text(b"image", b"im\xffge"),
    "facts that are a list": sealed(START + b"0" * 64 + b'"}}'.ljust(128)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_with_the_right_digest_is_refused(name: str) -> None:
    raw = HOSTILE[name]
    assert raw[8:].startswith(START)
    tracemalloc.start()
    try:
        with pytest.raises(EntryLostError):
            decode_header(raw)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(raw) + 2**20, "no memory by numbers from a file"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 8,
        b"\0" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2**20) + b" " * MAX_HEADER_NBYTES,
    ],
    ids=["nothing", "no length", "zeros", "a huge length", "an empty table", "null", "spaces"],
)
def test_what_is_no_header_of_ours_is_refused(raw: bytes) -> None:
    with pytest.raises(EntryLostError):
        decode_header(raw)


@pytest.mark.parametrize(
    "other",
    [
        replace(GOLDEN, meta=replace(GOLDEN.meta, key=bytes(32))),
        replace(GOLDEN, meta=replace(GOLDEN.meta, num_tokens=3)),
        replace(GOLDEN, meta=replace(GOLDEN.meta, entry_class=EntryClass("kv", "image", "11" * 8))),
        replace(GOLDEN, meta=replace(GOLDEN.meta, entry_class=EntryClass("kv", "video", "00ff" * 4))),
        replace(GOLDEN, rank=0),
        replace(GOLDEN, world_size=4),
        replace(GOLDEN, parts=GOLDEN.parts[::-1]),
        replace(GOLDEN, parts=GOLDEN.parts[:1], digests=GOLDEN.digests[:1]),
        replace(GOLDEN, parts=(PartSpec("layer.0", "F16", (2, 2, 1, 8)), GOLDEN.parts[1])),
        replace(GOLDEN, parts=(PartSpec("layer.0", "BF16", (2, 2, 8, 1)), GOLDEN.parts[1])),
    ],
)
def test_a_file_of_another_entry_rank_or_model_is_told_apart(other: Header) -> None:
    assert difference(decode_header(encode_header(other)), GOLDEN) is not None


def test_provenance_and_digests_may_be_any() -> None:
    other = replace(GOLDEN, meta=replace(GOLDEN.meta, provenance={}), digests=("00" * 32,) * 2)
    assert difference(decode_header(encode_header(other)), GOLDEN) is None


def test_a_part_whose_buffer_and_shape_differ_is_a_mistake_of_the_caller() -> None:
    good = filled(meta_of(1))[0][0]
    for wrong in (
        replace(good, shape=(9,)),
        replace(good, dtype="F32"),
        replace(good, dtype="F128"),
        replace(good, buffer=good.buffer[1:]),
    ):
        with pytest.raises(ValueError, match=r"layer\.0"):
            specs_of([wrong])
    with pytest.raises(ValueError, match="same name"):
        specs_of([good, good])


def test_provenance_is_bounded() -> None:
    meta = EntryMeta(bytes(32), 1, KV, {"note": "x" * 2**15})
    with pytest.raises(ValueError, match="provenance"):
        encode_header(replace(GOLDEN, meta=meta))


def test_buffers_of_any_kind_serve() -> None:
    """Shared memory, slices of it, items wider than a byte."""
    buffer = memoryview(bytearray(48)).cast("I")
    part = Part("positions", "I32", (3, 4), buffer)
    assert specs_of([part])[0].nbytes == 48
    assert bytes_of([[part]]) == [[bytes(48)]]
