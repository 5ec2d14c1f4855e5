"""Files at any fsspec URL. The only module that talks to S3 (s3fs, through fsspec)."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any, TypeVar

import fsspec

from infra.errors import UserError
from infra.storage.atomic import atomic_write

# An unreachable endpoint must be reported while the user is still looking.
_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3}}
}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3_OPTIONS, "s3a": _S3_OPTIONS, "local": {"auto_mkdir": True}}

ATTEMPTS = 6  # above those of the back ends, which repeat some failures and not others
_CONNECT_ATTEMPTS = 3  # where nobody answers at all: a wrong address is soon reported
_BACKOFF = (0.1, 8.0)  # seconds: the longest first wait, and the longest of all
_BACK_ENDS = ("aiohttp", "botocore", "gcsfs", "google", "azure", "requests", "urllib3")

_SECRET = re.compile(r"^[a-z0-9+]+://[^/]*:[^/]*@|[?&](x-amz-signature|x-goog-signature|signature|sig)=", re.IGNORECASE)

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_OBJECT_STORES = ("s3", "s3a")
_VERSION_QUERY = "?versionId="  # s3fs takes what follows in a key for a version

T = TypeVar("T")


def is_local(url: str) -> bool:
    """Whether `url` names a file of this machine."""
    return _SCHEME.match(url) is None or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL. An absolute part (a path or another URL) replaces what is before it.

    For parts that Fovea wrote itself. The names that `list_files` gives belong to `child`.
    """
    for part in parts:
        url = part if _SCHEME.match(part) or part.startswith("/") else f"{url.rstrip('/')}/{part}"
    return url


def child(url: str, name: str) -> str:
    """The URL of a file that `list_files` found under a URL. Whatever the name holds, it stays below that URL."""
    return f"{url.rstrip('/')}/{name}"


def parent(url: str) -> str:
    """What a URL lies in; of a bare name the working directory."""
    return url.rstrip("/").rpartition("/")[0] or "."


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path inside it.

    Raises:
        UserError: the protocol is unknown or its package is missing.
    """
    if _SECRET.search(url):
        shown = url.split("://")[0] + "://..."
        raise UserError(f"{shown}: the URL holds a credential; leave it to the storage's own chain of credentials")
    protocol = "file" if is_local(url) else url.partition("://")[0]
    try:
        opened = fsspec.get_filesystem_class(protocol)
        if protocol == "file":
            return opened(auto_mkdir=True), str(local_path(url).absolute())
        # Not through url_to_fs, for which :: in a name begins another URL and ? may hold options.
        hosts = {} if protocol in _OBJECT_STORES else opened._get_kwargs_from_urls(url)
        path = opened._strip_protocol(url)
        return opened(**{**_OPTIONS.get(protocol, {}), **hosts}), path
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}; use a path, s3://bucket/key or another fsspec URL") from None


@contextlib.contextmanager
def readable_errors(url: str) -> Iterator[None]:
    """Turn what storage back ends raise for a wrong URL or a dead network into a `UserError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{url}: not found; check the path or the bucket's name") from None
    except PermissionError:
        raise UserError(f"{url}: access denied; check the credentials and the bucket's policy") from None
    except Exception as error:
        remedy = _NETWORK_REMEDIES.get(type(error).__name__)
        if remedy is None and is_local(url) and (isinstance(error, IsADirectoryError) or "null byte" in str(error)):
            remedy = "is no file; check the path"
        elif remedy is None and isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            remedy = f"{error.strerror}; check the path"
        if remedy is None:
            raise
        raise UserError(f"{url}: {remedy}") from None


_NETWORK_REMEDIES = {
    "NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile",
    "PartialCredentialsError": "incomplete credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "EndpointConnectionError": "the endpoint is unreachable; check AWS_ENDPOINT_URL and the network",
    "ConnectTimeoutError": "the endpoint does not answer; check AWS_ENDPOINT_URL and the network",
    "ClientConnectorError": "the endpoint is unreachable; check AWS_ENDPOINT_URL and the network",
    "ConnectionRefusedError": "the endpoint refuses connections; check AWS_ENDPOINT_URL and the network",
}


def is_transient(error: Exception) -> bool:
    """Whether an error is the storage's and trying again may help."""
    lasting = FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError | PermissionError
    if isinstance(error, lasting) or "Credentials" in type(error).__name__:
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__.split(".")[0] in _BACK_ENDS


def sleep_before_retry(attempt: int) -> None:
    """Wait before another attempt: randomly long up to a bound that doubles, so that ranks do not return together."""
    first, most = _BACKOFF
    time.sleep(random.uniform(0, min(most, first * 2**attempt)))


def retries_exhausted(url: str, error: Exception) -> UserError:
    """The one line for a storage that fails again and again."""
    try:
        with readable_errors(url):
            raise error
    except UserError as known:
        return known
    except Exception:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return UserError(f"{url}: the storage failed {ATTEMPTS} times ({reason}); check the network and run again")


def with_retries(url: str, operation: Callable[[], T]) -> T:
    """Run an operation on a remote file, and retry it after transient failures.

    `range_reader` retries the missing pieces of a batch by the same rules, which a retry decorator cannot express.
    """
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:
            if is_local(url) or not is_transient(error):
                with readable_errors(url):
                    raise
            if attempt + 1 == (_CONNECT_ATTEMPTS if type(error).__name__ in _NETWORK_REMEDIES else ATTEMPTS):
                raise retries_exhausted(url, error) from None
            sleep_before_retry(attempt)
    raise AssertionError("unreachable")


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    if is_local(url):
        with readable_errors(url):
            return local_path(url).read_bytes()
    files, path = connect(url)
    return with_retries(url, lambda: bytes(files.cat_file(path)))


def exists(url: str) -> bool:
    """Whether a file is there."""
    files, path = connect(url)
    files.invalidate_cache()

    def look() -> bool:
        try:
            return bool(files.info(path)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    return with_retries(url, look)  # not isfile, which takes every failure for absence


def open_read(url: str) -> IO[bytes]:
    """Open a file for sequential reading."""
    with readable_errors(url):
        files, path = connect(url)
        return files.open(path, "rb")


def is_local_folder(url: str) -> bool:
    with readable_errors(url):
        return is_local(url) and local_path(url).is_dir()


def is_folder(url: str) -> bool:
    """Whether files lie under a URL."""
    if is_local(url):
        return is_local_folder(url)
    files, path = connect(url)
    files.invalidate_cache()
    return with_retries(url, lambda: bool(files.isdir(path)))


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """All files under a folder by their path relative to it, sorted, with what fsspec reports of each.

    Each has a `size` and a `type`: `file`, or why it cannot be read (`broken_link`, `special_file`, `unsafe_key`).
    Markers of empty folders in object stores are left out.

    Raises:
        UserError: there is no such folder.
    """
    if is_local_folder(url):
        return dict(sorted(_walk(local_path(url), "", set())))
    if not is_folder(url):
        if exists(url):
            raise UserError(f"{url}: is a single file; give a folder, or shards (.tar, .tar.gz, .tgz, .tar.zst)")
        raise UserError(f"{url}: not found; check the path or the bucket's name")
    files, path = connect(url)
    root = path.rstrip("/") + "/"
    listed = with_retries(url, lambda: files.find(path, detail=True))
    inside = {name.removeprefix(root): info for name, info in sorted(listed.items()) if name.startswith(root)}
    return {name: _stat_remote(name, info) for name, info in inside.items() if not _is_marker(name, info)}


def _is_marker(name: str, info: dict[str, Any]) -> bool:
    """Whether an object only marks a folder, as "Create folder" of S3 consoles writes it."""
    return (not name or name.endswith("/")) and not info.get("size")


def _stat_remote(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """What fsspec reports of an object; of a name that would be read as another one, that it cannot be read."""
    is_readable = bool(name) and not name.endswith("/") and _VERSION_QUERY not in name
    return {**info, "type": "file" if is_readable else "unsafe_key"}


def glob(url: str) -> list[str]:
    """URLs of the files that match a pattern with `*`."""
    files, path = connect(url)
    with readable_errors(url):
        return [str(files.unstrip_protocol(each)) for each in files.glob(path)]


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files below a local folder, through links to folders, each of which is entered once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen)
        else:
            yield prefix + entry.name, _stat_local(Path(entry.path))


def _stat_local(path: Path) -> dict[str, Any]:
    """Of a file or what a link leads to; pipes, devices and links to nowhere have no bytes."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return {"type": "broken_link", "size": 0}
    if not S_ISREG(status.st_mode):
        return {"type": "directory" if S_ISDIR(status.st_mode) else "special_file", "size": 0}
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns, "ino": status.st_ino}
    return {"type": "file", "size": status.st_size, **times}


def stat(url: str) -> dict[str, Any]:
    """What fsspec knows of one file, its `size` at least."""
    if is_local(url):
        with readable_errors(url):
            local_path(url).stat()
            return _stat_local(local_path(url))
    files, path = connect(url)
    files.invalidate_cache()
    return with_retries(url, lambda: dict(files.info(path)))


def write_atomic(url: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it.

    A local file is written beside its place, flushed to disk and renamed; an object store is atomic by itself.
    """
    if not is_local(url):
        files, path = connect(url)
        with_retries(url, lambda: files.pipe_file(path, data))
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, 0o644) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def create_exclusive(url: str, data: bytes) -> bool:
    """Write a small remote file that must not be there yet; False if it is, perhaps by an attempt of this call."""
    files, path = connect(url)

    def write() -> bool:
        try:
            files.pipe_file(path, data, mode="create")
        except OSError:
            if exists(url):  # object stores tell this each in their own words
                return False
            raise
        return True

    return with_retries(url, write)


def upload(local: Path, url: str) -> None:
    """Copy a local file to a URL."""
    files, path = connect(url)
    with_retries(url, lambda: files.put_file(str(local), path))


def download(url: str, local: Path) -> None:
    """Copy the file at a URL to a local path."""
    files, path = connect(url)
    with_retries(url, lambda: files.get_file(path, str(local)))


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it."""
    files, path = connect(url)
    with_retries(url, lambda: files.rm(path, recursive=True))
    files.invalidate_cache()


def mtime(url: str) -> float:
    """When a file was written last, in seconds since the epoch."""
    files, path = connect(url)
    files.invalidate_cache()
    return with_retries(url, lambda: files.modified(path).timestamp())
