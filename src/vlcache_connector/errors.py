"""Exceptions of this package. Each message says what is wrong and what to do about it."""


class VLCacheError(Exception):
    """Base class of everything this package raises on purpose."""


class OptionError(VLCacheError, ValueError):
    """An option of the connector, or of one request, has no valid value."""


class UnsupportedEngineError(VLCacheError, RuntimeError):
    """The installed vLLM is not a version this package was verified with."""


class UnsupportedModelError(VLCacheError, RuntimeError):
    """The loaded model cannot be driven layer by layer; its requests run as plain vLLM."""


class PositionMismatchError(VLCacheError, RuntimeError):
    """The position channels of a span did not all move by one and the same delta."""


class SnapshotError(VLCacheError, RuntimeError):
    """A snapshot of the host tier could not be begun, written or opened."""
