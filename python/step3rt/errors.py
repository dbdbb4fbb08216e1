"""The exceptions of step3rt, raised by the SDK, the extension module and the instances.

Owns the hierarchy and its fields; never decides when something is an error.
"""

from collections.abc import Mapping


class Step3Error(Exception):
    """Base of everything that step3rt raises on purpose.

    Attributes:
        reason: machine-readable reason, e.g. "QUEUE_FULL" (`google.rpc.ErrorInfo.reason`).
        is_retryable: whether the same call may succeed later.
        retry_after_s: the server's hint in seconds, if it gave one.
        request_id: the request concerned, if any.
        details: further fields, e.g. {"field": "sampling.temperature"}.
    """

    default_reason = "INTERNAL"
    default_is_retryable = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        is_retryable: bool | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.is_retryable = self.default_is_retryable if is_retryable is None else is_retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.details = dict(details or {})


class InvalidArgument(Step3Error):  # noqa: N818  (the names are those of the gRPC codes)
    """The request is not acceptable as it stands."""

    default_reason = "INVALID_PARAMETER"


class NotFound(Step3Error):  # noqa: N818
    """The request names something that does not exist, e.g. another model."""

    default_reason = "MODEL_NOT_FOUND"


class AlreadyExists(Step3Error):  # noqa: N818
    """A request with this id is live."""

    default_reason = "DUPLICATE_REQUEST_ID"


class ResourceExhausted(Step3Error):  # noqa: N818
    """The server has no room now; `retry_after_s` may say when to come back."""

    default_reason = "QUEUE_FULL"
    default_is_retryable = True


class Unavailable(Step3Error):  # noqa: N818
    """The server or an instance it needs is not there (yet, or any more)."""

    default_reason = "ENGINE_NOT_READY"
    default_is_retryable = True


class DeadlineExceeded(Step3Error):  # noqa: N818
    """The deadline passed before the result was complete."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(Step3Error):  # noqa: N818
    """The request was cancelled."""

    default_reason = "CANCELLED"


class Internal(Step3Error):  # noqa: N818
    """A defect in step3rt; the server's log has the details under the id in the message."""


class ConfigError(Step3Error):
    """Configuration, command line or checkpoint cannot be used; the process exits with 78."""

    default_reason = "BAD_CONFIGURATION"


class CheckpointError(ConfigError):
    """A checkpoint file is missing, truncated, misshapen or has surplus data.

    The message names file and tensor.
    """

    default_reason = "BAD_CHECKPOINT"


class CheckpointUnreadable(Step3Error):  # noqa: N818
    """A checkpoint's file fails, or changes, while weights are read; the process exits with 1.

    Not a `ConfigError`: the same files may be readable when a service manager starts it again.
    """

    default_reason = "CHECKPOINT_UNREADABLE"
    default_is_retryable = True
