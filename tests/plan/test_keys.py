"""Keys: every field counts, in full width, and no two different tuples of fields meet."""

import hashlib
import itertools

import pytest

from vlcache_connector.plan.keys import KeySpace, by_tag, digest, entry_class, is_content_hash, tenant_tag
from vlcache_connector.types import EntryClass

IMAGE = "3a" * 32
PLACES = "(1, 20, 20) None"


def space(kv_facts: bytes = b"kv facts", embedding_facts: bytes = b"embedding facts", epoch: bytes = b"") -> KeySpace:
    return KeySpace(kv_facts, embedding_facts, epoch)


def kv(keys: KeySpace, identifier: str, salt: str | None, modality: str = "image", places: str = PLACES) -> bytes:
    return keys.kv(modality, identifier, salt, places)


def embedding(keys: KeySpace, identifier: str, salt: str | None, modality: str = "image") -> bytes:
    return keys.embedding(modality, identifier, salt)


def test_a_digest_is_sha256_over_length_prefixed_parts() -> None:
    written_out = b"\2\0\0\0\0\0\0\0ab" + b"\0\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0c"
    assert digest(b"ab", b"", b"c") == hashlib.sha256(written_out).digest()


def test_parts_cannot_be_shifted_into_each_other() -> None:
    tuples: list[tuple[bytes, ...]] = [
        (),
        (b"",),
        (b"", b""),
        (b"abc",),
        (b"ab", b"c"),
        (b"a", b"bc"),
        (b"a", b"b", b"c"),
        (b"abc", b""),
        (b"", b"abc"),
        # A part that looks like a length prefix and its part.
        (b"\1\0\0\0\0\0\0\0a",),
        (b"a", b"\1\0\0\0\0\0\0\0a"),
        (b"a", b"a"),
        (b"a\1\0\0\0\0\0\0\0a",),
    ]
    assert len({digest(*parts) for parts in tuples}) == len(tuples)


def test_keys_have_full_width() -> None:
    assert len(kv(space(), IMAGE, None)) == len(embedding(space(), IMAGE, None)) == 32


def test_the_same_fields_give_the_same_key() -> None:
    assert kv(space(), IMAGE, "x") == kv(space(), IMAGE, "x")
    assert embedding(space(), IMAGE, "x") == embedding(space(), IMAGE, "x")


def test_every_field_changes_the_key() -> None:
    keys = {
        "base": kv(space(), IMAGE, "x"),
        "kind": embedding(space(), IMAGE, "x"),
        "facts": kv(space(kv_facts=b"kv factz"), IMAGE, "x"),
        "epoch": kv(space(epoch=b"\1"), IMAGE, "x"),
        "far epoch": kv(space(epoch=b"\1\0"), IMAGE, "x"),
        "first digit": kv(space(), "4" + IMAGE[1:], "x"),
        "last digit": kv(space(), IMAGE[:-1] + "b", "x"),
        "shorter identifier": kv(space(), IMAGE[:-1], "x"),
        "no salt": kv(space(), IMAGE, None),
        "empty salt": kv(space(), IMAGE, ""),
        "other salt": kv(space(), IMAGE, "y"),
        "salt that looks like a missing one": kv(space(), IMAGE, "-"),
        "salt of more than ascii": kv(space(), IMAGE, "ü"),
        "modality": kv(space(), IMAGE, "x", modality="video"),
        "embedding of another modality": embedding(space(), IMAGE, "x", modality="video"),
        "grid": kv(space(), IMAGE, "x", places="(1, 40, 10) None"),
        "seconds": kv(space(), IMAGE, "x", places="(1, 20, 20) 1.0"),
    }
    for (one, a), (other, b) in itertools.combinations(keys.items(), 2):
        assert a != b, f"{one} and {other} share a key"


def test_a_kv_key_and_an_embedding_key_differ_even_under_equal_facts() -> None:
    same = space(kv_facts=b"facts", embedding_facts=b"facts")
    assert kv(same, IMAGE, None) != embedding(same, IMAGE, None)


def test_embedding_keys_depend_on_embedding_facts_only() -> None:
    assert embedding(space(kv_facts=b"other"), IMAGE, None) == embedding(space(), IMAGE, None)
    assert embedding(space(embedding_facts=b"other"), IMAGE, None) != embedding(space(), IMAGE, None)
    assert kv(space(embedding_facts=b"other"), IMAGE, None) == kv(space(), IMAGE, None)


def test_a_new_epoch_hides_every_older_key() -> None:
    keys = space()
    old = {kv(keys, IMAGE, None), embedding(keys, IMAGE, None)}
    keys.forget()
    assert not old & {kv(keys, IMAGE, None), embedding(keys, IMAGE, None)}


@pytest.mark.parametrize(("salt", "identifier"), [("x", "yz"), ("xy", "z"), ("", "xyz"), ("xyz", "")])
def test_salt_and_identifier_do_not_run_into_each_other(salt: str, identifier: str) -> None:
    others = [("x", "yz"), ("xy", "z"), ("", "xyz"), ("xyz", "")]
    others.remove((salt, identifier))
    assert kv(space(), identifier, salt) not in {kv(space(), i, s) for s, i in others}


@pytest.mark.parametrize("identifier", ["0" * 64, "f" * 64, "0123456789abcdef" * 4, hashlib.sha256(b"").hexdigest()])
def test_sixty_four_hex_digits_are_a_content_hash(identifier: str) -> None:
    assert is_content_hash(identifier)


@pytest.mark.parametrize(
    "identifier",
    [
        "",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "a" * 63 + "F",
        "a" * 63 + "g",
        "a" * 64 + "\n",
        "\n" + "a" * 64,
        " " + "a" * 63,
        "a" * 32 + "\n" + "a" * 31,
        "\u0661" * 64,  # digits, but not hex digits of ASCII
        "\uff41" * 64,  # full-width letters
        "req-image-0",
        "chatcmpl-9f2c-image-0",
        "123e4567-e89b-12d3-a456-426614174000",
        "0x" + "a" * 62,
    ],
    ids=ascii,
)
def test_anything_else_is_not(identifier: str) -> None:
    assert not is_content_hash(identifier)


def test_a_tenants_tag_is_the_beginning_of_a_digest_and_nobodys_is_empty() -> None:
    assert tenant_tag("abc") == hashlib.sha256(b"abc").hexdigest()[:16]
    assert tenant_tag(None) == ""
    assert tenant_tag("") == hashlib.sha256(b"").hexdigest()[:16], "an empty salt is a tenant of its own"


def test_the_class_of_an_entry_names_kind_modality_and_tenant() -> None:
    assert entry_class("kv", "image", None) == EntryClass("kv", "image", "")
    assert entry_class("embedding", "video", "abc") == EntryClass("embedding", "video", tenant_tag("abc"))
    assert entry_class("kv", "image", "abc") is entry_class("kv", "image", "abc"), "a million entries share it"


def test_limits_name_tenants_by_salt_and_the_tiers_by_tag() -> None:
    limits = {"kv": 0.5, "tenant": 0.2, "tenant:abc": 0.3, "tenant:": 0.1, "tenant:tenant:x": 0.4}
    tags = {f"tenant:{tenant_tag(salt)}": share for salt, share in (("abc", 0.3), ("", 0.1), ("tenant:x", 0.4))}
    assert by_tag(limits) == {"kv": 0.5, "tenant": 0.2} | tags
