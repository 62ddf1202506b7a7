"""Object stores as the stages see them: what is missing is missing, all other trouble is one sentence.

An image that is not there is a bad row. A store that does not answer must never look like one, so what
is left after the client's retries ends the stage (`StoreError`), and the same command goes on later.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec

from curation import secrets
from curation.errors import GO_ON, UserError

ATTEMPTS = 10
"""Of the client, per request, with growing pauses: about a minute. AWS_MAX_ATTEMPTS says otherwise."""
BODY_ATTEMPTS = 6
CUT_BODIES = ("ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError")
"""What a connection that breaks in the middle of an answer raises: no client tries that again often enough."""
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, UserError)
_MISTAKES = (ValueError, TypeError, AttributeError, NotImplementedError, EOFError, MemoryError)


class StoreError(UserError):
    """An object store refused or failed. exit_code 1."""


def connect(path: str) -> tuple["Store", str]:
    """The store of a URL, and the path inside it. Raises UserError for a URL with keys in it, or of an unknown kind."""
    protocol = path.split("://", 1)[0]
    if secrets.without_credentials(path) != path:
        raise UserError(
            f"{path}: keys do not belong in an address, it is written to files and logs; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your store reads) in the environment"
        )
    try:
        fs, inner = fsspec.core.url_to_fs(path, **_options(protocol))
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    fs.invalidate_cache()  # another process may have written since
    if protocol in ("s3", "s3a"):
        fs.retries = 2  # s3fs's own, around those of the client, twice: they multiply
    return Store(fs, protocol), str(inner)


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("s3", "s3a"):
        return {}
    retries = {
        "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS)),
    }
    return {"use_listings_cache": False, "config_kwargs": {"retries": retries}}


class Store:
    """An fsspec filesystem whose failures are sentences; used like the filesystem itself."""

    def __init__(self, fs: Any, protocol: str) -> None:
        self.raw = fs
        self.name = protocol

    def open(self, path: str, mode: str = "rb", **options: Any) -> "Opened":
        """An open file whose failures are sentences too."""
        where = f"{self.name}://{path}"
        return Opened(_guarded(self.raw.open, where)(path, mode, **options), where)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file or a range of it; b"" beyond its end."""
        # One stream: s3fs tries again what broke in the middle of that, but not in the middle of parallel ones.
        options = {"max_concurrency": 1} if self.name in ("s3", "s3a") else {}
        try:
            return bytes(_guarded(self.raw.cat_file, f"{self.name}://{path}")(path, start=start, end=end, **options))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return b""
            raise

    def put_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        """Put if the object still is the one with `etag` (None: if there is none). Returns the new etag.

        None: it was not so, nothing was written. A store that knows no conditions puts all the same.
        """
        where = f"{self.name}://{path}"
        if self.name not in ("s3", "s3a"):
            if etag is None and self.raw.exists(path):
                return None
            _guarded(self.raw.pipe_file, where)(path, data)
            return ""
        bucket, key, _ = self.raw.split_path(path)
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        put = _guarded(self.raw.call_s3, where)
        try:
            answer = put("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except (FileExistsError, FileNotFoundError):
            return None
        except OSError as error:
            if code_of(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return None
            if code_of(error) != "NotImplemented":
                raise
            answer = put("put_object", Bucket=bucket, Key=key, Body=data)
        return str(answer["ETag"])

    def age_s(self, path: str) -> float | None:
        """Seconds since an object was written, all by the store's clock; None where the store does not say."""
        where = f"{self.name}://{path}"
        if self.name not in ("s3", "s3a"):
            return self._age_by_probe_s(path)
        bucket, key, _ = self.raw.split_path(path)
        answer = _guarded(self.raw.call_s3, where)("head_object", Bucket=bucket, Key=key)
        said_at = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if said_at is None:
            return None
        return float((parsedate_to_datetime(said_at) - answer["LastModified"]).total_seconds())

    def _age_by_probe_s(self, path: str) -> float | None:
        probe = f"{path}-probe-{uuid.uuid4().hex}"
        try:
            self.pipe_file(probe, b"")
            try:
                return float((self.modified(probe) - self.modified(path)).total_seconds())
            finally:
                self.rm_file(probe)
        except (NotImplementedError, AttributeError):
            return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "raw":
            raise AttributeError(name)
        value = getattr(self.raw, name)
        return _guarded(value, f"{self.name}://") if callable(value) else value


class Opened:
    """A file of a store."""

    def __init__(self, file: Any, where: str) -> None:
        self._file = file
        self._where = where

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_file":
            raise AttributeError(name)
        value = getattr(self._file, name)
        return _guarded(value, self._where) if callable(value) else value

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


def _guarded(call: Callable[..., Any], where: str) -> Callable[..., Any]:
    def guarded(*arguments: Any, **options: Any) -> Any:
        for attempt in range(1, BODY_ATTEMPTS + 1):
            try:
                return call(*arguments, **options)
            except (*_ANSWERS, *_MISTAKES):
                raise
            except Exception as error:  # clients of stores have exceptions of many libraries, none with a common base
                if code_of(error) in CONDITIONS:
                    raise
                if type(error).__name__ in CUT_BODIES and attempt < BODY_ATTEMPTS:
                    time.sleep(0.1 * 2**attempt)
                    continue
                first = arguments[0] if arguments and where.endswith("://") else ""
                raise said(f"{where}{first if isinstance(first, str) else ''}", error) from error
        raise AssertionError("the last attempt returns or raises")

    return guarded


CONDITIONS = ("PreconditionFailed", "ConditionalRequestConflict", "InvalidRange", "NotImplemented", "409", "412", "416")
"""Answers to what was asked, not failures."""


def code_of(error: BaseException) -> str:
    """The code of an S3 answer (`SlowDown`, or `503` where it says no more); "" of everything else."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def said(where: str, error: Exception) -> StoreError:
    """The sentence for what a store's client raised."""
    code, kind = code_of(error), type(error).__name__
    if code in REFUSED or isinstance(error, PermissionError) or "Credential" in kind:
        return StoreError(
            f"{where}: the object store refuses this ({code or kind}); check the credentials in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3) and the rights of the bucket",
            exit_code=1,
        )
    if code:
        return StoreError(f"{where}: the object store failed ({code}), all retries included; {GO_ON}", exit_code=1)
    reason = (str(error).splitlines()[0] if str(error) else "")[:160]
    return StoreError(
        f"{where}: the object store does not answer ({kind}{': ' if reason else ''}{reason}); look at the network and "
        f"the address of the store (AWS_ENDPOINT_URL), then {GO_ON}",
        exit_code=1,
    )
