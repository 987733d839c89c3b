"""What a run may raise; a bad row is not here, it goes to the rejects with a reason.

Ip2pError
|-- ConfigError    a setting or an argument is wrong
|-- ImageError     the bytes of one image cannot be used; a stage makes a reject of it
|   `-- LargeImageError  they would decode to more pixels than are accepted
|-- ModelError     a weights folder is missing or broken; names it
|-- DatasetError   a dataset is missing, incomplete or of another schema; names it
|-- StorageError   object storage refuses, or cannot be reached; names the URI
|-- ReplyError     one caption got no reply; a stage makes a reject of it
|-- QueueFullError    an engine has as many requests waiting as it takes
|-- StoppedError      an engine was closed, or its device failed
|-- DeadlineError     a request took longer than it was allowed
|-- BudgetError    a spending cap or the account's quota is reached; what was paid is kept
|-- StageError     a stage of the flow failed, or rejected more rows than it may
|-- EditError      the editing service could not finish one edit
`-- ServiceError   the editing service cannot be reached, or has no place now
    `-- AccessError  it wants a key, or another one

ConfigError and ImageError are ValueErrors too. No class has an `__init__`, so that each survives
pickling between Ray processes.
"""

from __future__ import annotations


class Ip2pError(Exception):
    """Anything that this package raises on purpose."""


class ConfigError(Ip2pError, ValueError):
    """A setting or an argument is outside what is allowed; the text says the rule and the value."""


class ImageError(Ip2pError, ValueError):
    """One image cannot be decoded or is too large; the text says why."""


class LargeImageError(ImageError):
    """One image has more pixels than are accepted; by its header, nothing was decoded."""


class ModelError(Ip2pError):
    """A folder of weights is missing or broken; the text names it."""


class DatasetError(Ip2pError):
    """A dataset is missing, incomplete or has another schema; the text names its URI."""


class StorageError(Ip2pError):
    """Object storage refuses a request, or cannot be reached; the text names the URI and why."""


class ReplyError(Ip2pError):
    """A language model gave no reply to one caption; the text says after which failures."""


class QueueFullError(Ip2pError):
    """As many requests wait as are taken; nothing was done, it may be sent again later."""


class StoppedError(Ip2pError):
    """An engine takes no requests any more; this one was not done, and may be sent elsewhere."""


class DeadlineError(Ip2pError):
    """A request was not done in the time that it was given; the text says how long that was."""


class BudgetError(Ip2pError):
    """A spending cap or the account's quota is reached; once raised, the same command goes on."""


class StageError(Ip2pError):
    """A stage failed as a whole; the text names the stage."""


class EditError(Ip2pError):
    """The editing service could not finish one edit; the text says why."""


class ServiceError(Ip2pError):
    """The editing service cannot be reached, has no place now, or is none; the text says which."""

    retry_after_s: float | None = None
    """Seconds after which the same request may succeed; None where waiting does not help."""


class AccessError(ServiceError):
    """The editing service wants a key, or another one than was sent."""
