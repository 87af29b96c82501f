"""Keys: every field counts, in full width, and no two different tuples of fields meet."""

import hashlib
import itertools

import pytest

from vlcache_connector.plan.keys import KeySpace, by_tag, digest, entry_class, is_content_hash, tenant_tag
from vlcache_connector.types import EntryClass

IMAGE = "3a" * 32


def space(kv_facts: bytes = b"kv facts", embedding_facts: bytes = b"embedding facts", epoch: bytes = b"") -> KeySpace:
    return KeySpace(kv_facts, embedding_facts, epoch)


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
    assert len(space().kv(IMAGE, None)) == len(space().embedding(IMAGE, None)) == 32


def test_the_same_fields_give_the_same_key() -> None:
    assert space().kv(IMAGE, "x") == space().kv(IMAGE, "x")
    assert space().embedding(IMAGE, "x") == space().embedding(IMAGE, "x")


def test_every_field_changes_the_key() -> None:
    keys = {
        "base": space().kv(IMAGE, "x"),
        "kind": space().embedding(IMAGE, "x"),
        "facts": space(kv_facts=b"kv factz").kv(IMAGE, "x"),
        "epoch": space(epoch=b"\1").kv(IMAGE, "x"),
        "far epoch": space(epoch=b"\1\0").kv(IMAGE, "x"),
        "first digit": space().kv("4" + IMAGE[1:], "x"),
        "last digit": space().kv(IMAGE[:-1] + "b", "x"),
        "shorter identifier": space().kv(IMAGE[:-1], "x"),
        "no salt": space().kv(IMAGE, None),
        "empty salt": space().kv(IMAGE, ""),
        "other salt": space().kv(IMAGE, "y"),
        "salt that looks like a missing one": space().kv(IMAGE, "-"),
        "salt of more than ascii": space().kv(IMAGE, "ü"),
    }
    for (one, a), (other, b) in itertools.combinations(keys.items(), 2):
        assert a != b, f"{one} and {other} share a key"


def test_a_kv_key_and_an_embedding_key_differ_even_under_equal_facts() -> None:
    same = space(kv_facts=b"facts", embedding_facts=b"facts")
    assert same.kv(IMAGE, None) != same.embedding(IMAGE, None)


def test_embedding_keys_depend_on_embedding_facts_only() -> None:
    assert space(kv_facts=b"other").embedding(IMAGE, None) == space().embedding(IMAGE, None)
    assert space(embedding_facts=b"other").embedding(IMAGE, None) != space().embedding(IMAGE, None)
    assert space(embedding_facts=b"other").kv(IMAGE, None) == space().kv(IMAGE, None)


def test_a_new_epoch_hides_every_older_key() -> None:
    keys = space()
    old = {keys.kv(IMAGE, None), keys.embedding(IMAGE, None)}
    keys.forget()
    assert not old & {keys.kv(IMAGE, None), keys.embedding(IMAGE, None)}


@pytest.mark.parametrize(("salt", "identifier"), [("x", "yz"), ("xy", "z"), ("", "xyz"), ("xyz", "")])
def test_salt_and_identifier_do_not_run_into_each_other(salt: str, identifier: str) -> None:
    others = [("x", "yz"), ("xy", "z"), ("", "xyz"), ("xyz", "")]
    others.remove((salt, identifier))
    assert space().kv(identifier, salt) not in {space().kv(i, s) for s, i in others}


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
    assert entry_class("kv", None) == EntryClass("kv", "image", "")
    assert entry_class("embedding", "abc") == EntryClass("embedding", "image", tenant_tag("abc"))
    assert entry_class("kv", "abc") is entry_class("kv", "abc"), "a million entries share it"


def test_limits_name_tenants_by_salt_and_the_tiers_by_tag() -> None:
    limits = {"kv": 0.5, "tenant": 0.2, "tenant:abc": 0.3, "tenant:": 0.1, "tenant:tenant:x": 0.4}
    tags = {f"tenant:{tenant_tag(salt)}": share for salt, share in (("abc", 0.3), ("", 0.1), ("tenant:x", 0.4))}
    assert by_tag(limits) == {"kv": 0.5, "tenant": 0.2} | tags
