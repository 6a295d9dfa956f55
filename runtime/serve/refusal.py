"""What a client is told instead of an answer, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from smoe.artifacts import SmoeError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


class Refusal(SmoeError):
    """A sentence with a status of HTTP. `param` is the field that it is about, `code` a word for
    programs, `retry` the seconds after which another try is worth it."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    def as_dict(self) -> dict[str, Any]:
        """The body, or the last event of a stream."""
        kind = KINDS.get(self.status, "server_error")
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": said}

    def headers(self) -> dict[str, str]:
        """Those that go with the status."""
        given = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return given | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def busy(message: str, retry: int = 1) -> Refusal:
    """Another try will do."""
    return Refusal(message, 503, code="busy", retry=retry)


def broken() -> Refusal:
    """Something that is no fault of the client's, of which it learns no more."""
    return Refusal("The answer failed here; the server's log says of what.", 500, code="failed")
