"""The one place that knows which engine versions work, and fails early with a sentence a user can act on."""

from vlcache_connector.errors import UnsupportedEngineError

SUPPORTED = ("0.32",)


def require_supported_engine(version: str | None = None) -> None:
    """Raise `UnsupportedEngineError` unless the installed vLLM (or `version`) is one this package was verified with."""
    found = _installed_version() if version is None else version
    if not any(found == v or found.startswith((f"{v}.", f"{v}+")) for v in SUPPORTED):
        raise UnsupportedEngineError(
            f"vlcache-connector works with vLLM {' and '.join(SUPPORTED)}, but vLLM {found} is installed. "
            f"Install vllm=={SUPPORTED[-1]}.* or remove VLCacheConnector from --kv-transfer-config."
        )


def _installed_version() -> str:
    import vllm

    version: str = vllm.__version__
    return version
