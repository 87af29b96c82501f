"""VLCache for an unmodified vLLM: reuse what a vision-language model has already computed.

Importing this package costs nothing and patches nothing; the connectors are imported on first use, because they
import vLLM.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["VLCacheConnector", "VLCacheECConnector", "__version__"]

_CONNECTORS = {
    "VLCacheConnector": "vlcache_connector.engine.kv_connector",
    "VLCacheECConnector": "vlcache_connector.engine.ec_connector",
}

try:
    __version__ = version("vlcache-connector")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _CONNECTORS:
        return getattr(import_module(_CONNECTORS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
