"""Files at any fsspec URL. The only module that talks to S3 (s3fs, through fsspec)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from infra.errors import UserError

# An unreachable endpoint must be reported while the user is still looking.
_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3}}
}


def is_local(url: str) -> bool:
    """Whether `url` names a file of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL. An absolute part (a path or another URL) replaces what is before it."""
    for part in parts:
        url = part if "://" in part or part.startswith("/") else f"{url.rstrip('/')}/{part}"
    return url


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path inside it.

    Raises:
        UserError: the protocol is unknown or its package is missing.
    """
    options = _S3_OPTIONS if url.startswith(("s3://", "s3a://")) else {}
    try:
        filesystem, path = url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}; use a path, s3://bucket/key or another fsspec URL") from None
    return filesystem, path


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


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    with readable_errors(url):
        if is_local(url):
            return local_path(url).read_bytes()
        files, path = filesystem(url)
        return bytes(files.cat_file(path))


def exists(url: str) -> bool:
    """Whether a file is there."""
    with readable_errors(url):
        files, path = filesystem(url)
        files.invalidate_cache()
        return bool(files.isfile(path))


def open_read(url: str) -> IO[bytes]:
    """Open a file for sequential reading."""
    with readable_errors(url):
        files, path = filesystem(url)
        return files.open(path, "rb")


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """All files under a folder by their path relative to it, sorted, with what fsspec knows of each (`size` at least).

    Raises:
        UserError: there is no such folder.
    """
    with readable_errors(url):
        files, path = filesystem(url)
        files.invalidate_cache()
        if not files.isdir(path):
            if files.exists(path):
                raise UserError(f"{url}: is a single file; give a folder, or shards (.tar, .tar.gz, .tgz, .tar.zst)")
            raise FileNotFoundError(url)
        root = path.rstrip("/") + "/"
        return {name.removeprefix(root): info for name, info in sorted(files.find(path, detail=True).items())}


def details(url: str) -> dict[str, Any]:
    """What fsspec knows of one file, its `size` at least."""
    with readable_errors(url):
        files, path = filesystem(url)
        files.invalidate_cache()
        return dict(files.info(path))


def write_atomic(url: str, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it.

    A local file is written beside its place, flushed to disk and renamed; an object store is atomic by itself.
    """
    if not is_local(url):
        with readable_errors(url):
            files, path = filesystem(url)
            files.pipe_file(path, data)
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def upload(local: Path, url: str) -> None:
    """Copy a local file to a URL."""
    with readable_errors(url):
        files, path = filesystem(url)
        files.put_file(str(local), path)


def download(url: str, local: Path) -> None:
    """Copy the file at a URL to a local path."""
    with readable_errors(url):
        files, path = filesystem(url)
        files.get_file(path, str(local))
