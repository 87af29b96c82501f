"""`kv_connector_module_path` of an engine in which our connector reuses KV beside LMCache's as well, as it must not."""

from vlcache_connector.engine import siblings
from vlcache_connector.engine.kv_connector import VLCacheConnector

__all__ = ["VLCacheConnector"]

siblings.KEYED_BY_BLOCK = (*siblings.KEYED_BY_BLOCK, "LMCacheMPConnector")  # type: ignore[assignment]
