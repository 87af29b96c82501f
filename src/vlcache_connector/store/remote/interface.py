"""What of lmcache is used: looked for before anything is connected, so that a change of it ends in a sentence."""

import os
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from vlcache_connector.errors import OptionError

SUPPORTED = ">=0.5.4,<0.6"  # as in pyproject.toml
TIMEOUT_S = 2.0
INSTALL = "pip install 'vlcache-connector[lmcache]'"

# Read when lmcache is imported; without the first it reports to its makers.
_QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING", "LMCACHE_DISABLE_BANNER": "1"}
_ADAPTER_METHODS = (
    "submit_store_task",
    "pop_completed_store_tasks",
    "get_store_event_fd",
    "submit_lookup_and_lock_task",
    "query_lookup_and_lock_result",
    "get_lookup_and_lock_event_fd",
    "submit_unlock",
    "submit_load_task",
    "query_load_result",
    "get_load_event_fd",
    "delete",
    "close",
)


def require_lmcache() -> None:
    """Raises `OptionError` with advice unless the installed lmcache is one that this module can drive."""
    try:
        version = metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        raise OptionError(f"option 'remote' needs lmcache: {INSTALL}") from None
    if missing := missing_interface():
        raise OptionError(
            f"option 'remote' cannot use lmcache {version}: {'; '.join(missing)}. Install lmcache{SUPPORTED}: {INSTALL}"
        )


def missing_interface() -> list[str]:
    """What this package uses of lmcache and does not find, in words."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from lmcache.v1.distributed.api import ObjectKey
        from lmcache.v1.distributed.l2_adapters import L2AdapterInterface, create_l2_adapter  # noqa: F401
        from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class  # noqa: F401
        from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj
        from lmcache.v1.platform import consume_fd  # noqa: F401
    except ImportError as error:
        return [f"it does not import ({error})"]
    wanted: dict[Any, tuple[str, ...]] = {
        L2AdapterInterface: _ADAPTER_METHODS,
        TensorMemoryObj: ("byte_array",),
    }
    fields: dict[Any, tuple[str, ...]] = {
        ObjectKey: ("chunk_hash", "model_name", "kv_rank", "object_group_id", "cache_salt"),
        MemoryObjMetadata: ("shape", "dtype", "address", "phy_size", "ref_count", "shapes", "dtypes"),
    }
    found: dict[Any, Collection[str]] = {owner: dir(owner) for owner in wanted}
    found |= {owner: getattr(owner, "__dataclass_fields__", ()) for owner in fields}
    return [
        f"its {owner.__name__} has no {name}"
        for owner, names in (wanted | fields).items()
        for name in names
        if name not in found[owner]
    ]


def parse(description: Mapping[str, Any]) -> tuple[Any, float]:
    """The option `remote`: lmcache's own object for an adapter, and seconds for one operation. Raises `OptionError`."""
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

    facts = dict(description)
    kind, timeout_s = facts["type"], facts.pop("timeout_s", TIMEOUT_S)
    try:
        return get_l2_adapter_config_class(kind).from_dict(facts), timeout_s
    except ImportError as error:
        raise OptionError(
            f"option 'remote' has type {kind!r}, which lmcache does not know or cannot load: {error}"
        ) from error
    except (ValueError, TypeError) as error:
        raise OptionError(f"option 'remote' is no description of an lmcache adapter: {error}") from error
