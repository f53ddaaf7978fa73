"""What the server refuses, in the words of OpenAI's API; knows no request."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer with an error in it.

    Args:
        status: of HTTP. message: what was expected, what came, what to do. param: the field at fault. code: for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        #: Of the HTTP answer.
        self.headers: dict[str, str] = {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if status in (429, 503):
            self.headers["Retry-After"] = "1"

    @property
    def kind(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(name: str, message: str, code: str | None = None) -> ApiError:
    """Status 400 because of one field."""
    return ApiError(400, message, name, code)
