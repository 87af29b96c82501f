"""Pictures of a task file: found, decoded once to see that they can be, and handed to the engine as data URLs."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from vlcache_connector.errors import VLCacheError


class PictureError(VLCacheError):
    """A picture is missing, or is none."""


class Pictures:
    """Pictures by the references that a task file in `folder` makes to them. Each is decoded once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}  # reference -> digest of the file's bytes

    def reference(self, url: Any) -> str:
        """The absolute path or data URL of a picture. Raises `PictureError` unless it can be decoded."""
        if not isinstance(url, str) or not url or "\0" in url:
            raise PictureError(f"a picture is {url!r:.80}; give a path relative to the task file, or a data URL")
        name = f"{url[:60]}..." if len(url) > 63 else url
        if "://" in url[:16]:
            raise PictureError(f"the picture {name!r} is on the network; download it and give its path")
        reference = url if url.startswith("data:") else str((self._folder / url).absolute())
        if reference not in self._digests:
            raw = _bytes_of(reference, name)
            _decode(raw, name)
            self._digests[reference] = hashlib.sha256(raw).hexdigest()
        return reference

    def fingerprint(self, chats: list[list[dict[str, Any]]]) -> str:
        """Of chats whose pictures were referred to here: equal if and only if words and pictures are."""
        told = [[{**message, "content": self._hashed(message["content"])} for message in chat] for chat in chats]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    def _hashed(self, content: Any) -> Any:
        """With the digest of each picture in its place."""
        if isinstance(content, str):
            return content
        return [{"image": self._digests[p["image_url"]["url"]]} if p["type"] == "image_url" else p for p in content]


def data_url(reference: str) -> str:
    """What vLLM takes without being allowed to read files."""
    if reference.startswith("data:"):
        return reference
    return f"data:image;base64,{base64.b64encode(Path(reference).read_bytes()).decode()}"


def _bytes_of(reference: str, name: str) -> bytes:
    if not reference.startswith("data:"):
        try:
            return Path(reference).read_bytes()
        except OSError as error:
            raise PictureError(
                f"the picture {name!r} cannot be read: {error.strerror}; paths are relative to the task file"
            ) from None
    header, comma, data = reference.partition(",")
    try:
        if not comma or not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise PictureError(f"{name!r} is no picture; write data:image/png;base64,... with base64 data") from None


def _decode(raw: bytes, name: str) -> None:
    from PIL import Image  # comes with vLLM

    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
    except Exception as error:  # decoders of damaged files raise all kinds
        raise PictureError(f"{name!r} is no picture that can be decoded ({error})") from None
