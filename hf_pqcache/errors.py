"""The errors that users of the cache meet, each with a code to search for; knows nothing else of the package."""


class PQCacheError(Exception):
    """Base of all errors raised by the cache itself. `code` is stable across releases; the message names the way out."""

    code = "PQC000"

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.code}] {message}")


class PagesExhaustedError(PQCacheError, RuntimeError):
    """PQC001: the page pool has no free page left. The cache is unchanged and still usable."""

    code = "PQC001"


class NoKernelError(PQCacheError, NotImplementedError):
    """PQC002: the user forced a kernel that does not exist for this shape. Never raised unless one was forced."""

    code = "PQC002"


class WindowOverflowError(PQCacheError, BufferError):
    """PQC003: more tokens would have to stay in full precision than the exact window holds."""

    code = "PQC003"


class CacheOutOfMemoryError(PQCacheError, MemoryError):
    """PQC004: the device has no memory for the page pool or the exact window. The cache is unchanged and still usable."""

    code = "PQC004"
