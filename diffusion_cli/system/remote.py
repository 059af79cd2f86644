"""Files and folders at URLs of any protocol of fsspec, copied once to a folder of this machine."""

import errno
import re
import shutil
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from diffusion_cli.errors import FormatError, MachineError, UsageError
from diffusion_cli.system.files import atomic_write, writing
from diffusion_cli.system.locks import locked
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import printable, reason

COPIES = "remote"
"""Folder of the copies, below the folder of downloaded datasets."""
MOST_FILES = 10**7
BLOCK = 2**22
"""Bytes read at a time."""
AT_ONCE = 16
"""Files copied at the same time, because each request waits for the server."""
VERSIONS = ("etag", "md5", "checksum", "sha256", "lastmodified", "mtime", "created")
"""Properties of a file that change with its content, in lower case without separators."""
UNREACHABLE = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
NETWORK_ERRORS = {
    "aiohttp.ClientConnectionError",
    "azure.ServiceRequestError",
    "botocore.ConnectTimeoutError",
    "botocore.ConnectionClosedError",
    "botocore.EndpointConnectionError",
    "botocore.ReadTimeoutError",
    "httpx.NetworkError",
    "httpx.TimeoutException",
    "requests.ConnectionError",
    "requests.Timeout",
}
"""Errors of a network by package and class, because only some of the packages are installed."""


class _Listing(NamedTuple):
    """The files at a URL."""

    system: Any
    """File system of fsspec."""
    paths: dict[str, str]
    """Path in the file system by relative name; a single file has an empty name."""
    sizes: dict[str, int | None]
    version: str
    """Hash of names, sizes and versions of the files."""


def local_copy(path: str, data_dir: Path, key: str = "dataset.path") -> Path:
    """Return a local path: `path` itself, or the copy of the file or folder at this URL, copied if it has changed.

    Copies are in `data_dir/remote`. If the network fails, the newest copy is used, with a line on stderr. Any other
    failure is an error, such as an expired token: an old copy would hide that the data have changed.

    Args:
        path: path or URL.
        data_dir: folder of downloaded datasets.
        key: configuration key of the path, for errors.

    Raises:
        UsageError: the URL cannot be read, needs a package that is missing, or is larger than the free disk space.
        MachineError: the copy cannot be written.
    """
    if "://" not in path:
        return Path(path).expanduser()
    place = data_dir.expanduser() / COPIES / sha256(path.encode()).hexdigest()[:16]
    try:
        listing = _listing(path, key)
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(key, path, "needs another package", reason(error)) from error
    except Exception as error:  # file systems raise errors of many types
        if not _is_network_failure(error):
            raise UsageError(key, path, *_failure(error)) from error
        problem, copies = (
            f"cannot be reached ({reason(error.__cause__ or error)})",
            [*place.glob(f"*/{_name(path)}")],
        )
        if not copies:
            raise UsageError(key, path, problem, "check the network, or copy the data by hand") from error
        newest = max(copies, key=lambda copy: copy.parent.stat().st_mtime)
        date = datetime.fromtimestamp(newest.parent.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        line = f"{key}={path}: {problem}; using the copy of {date}"
        print(f"diffuse: {printable(line)}", file=sys.stderr)
        return newest
    copy = place / listing.version / _name(path)
    if not copy.exists():
        with writing(copy), locked(copy):  # one process copies, the others wait
            if not copy.exists():
                _copy(listing, copy, key, path)
                _report_earlier(copy.parent, f"{key}={path}")
    return copy


def _report_earlier(newest: Path, named: str) -> None:
    """Print a line with the size of earlier copies. They are not removed: another process may still read them."""
    earlier = [folder for folder in newest.parent.iterdir() if folder.is_dir() and folder != newest]
    if not earlier:
        return
    size = sum(file.lstat().st_size for folder in earlier for file in folder.rglob("*") if file.is_file())
    line = f"{named}: earlier copies take {size / 1e9:.1f} GB; remove them if no command uses them: "
    print(f"diffuse: {printable(line + ' '.join(map(str, earlier)))}", file=sys.stderr)


def _listing(url: str, key: str) -> _Listing:
    """Return the files at a URL; UsageError for a web page, FormatError for no files or one outside of the folder."""
    system, root = fsspec.url_to_fs(url)
    info = system.info(root)
    if info.get("mimetype") == "text/html":
        remedy = "give the URL of a file, such as a .zip; HTTP has no folders"
        raise UsageError(key, url, "is a web page", remedy)
    found = {root: info} if info["type"] == "file" else system.find(root, detail=True)
    paths, sizes, versions = {}, {}, []
    for path, entry in found.items():
        name = path.removeprefix(root).strip("/") if info["type"] != "file" else ""
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\0" in name:
            raise FormatError(f"has a file named {name!r}, outside of the folder")
        if not name and info["type"] != "file":  # the marker of a folder in an object store
            continue
        paths[name], sizes[name] = path, entry.get("size")
        marks = {re.sub("[^a-z0-9]", "", key.lower()): value for key, value in entry.items()}
        versions.append((name, entry.get("size"), [str(marks.get(mark)) for mark in VERSIONS]))
    if not 0 < len(paths) <= MOST_FILES:
        raise FormatError(f"has {len(paths)} files; must have 1 to {MOST_FILES}")
    return _Listing(system, paths, sizes, sha256(repr(sorted(versions)).encode()).hexdigest()[:16])


def _copy(listing: _Listing, copy: Path, key: str, url: str) -> None:
    """Copy all files, and rename the copy when it is complete. A later call continues after a kill."""
    total = sum(size or 0 for size in listing.sizes.values())
    free = shutil.disk_usage(copy.parent).free
    if total > free:
        problem = f"has {total / 1e9:.1f} GB, and {copy.parent} has room for {free / 1e9:.1f} GB"
        raise UsageError(key, url, problem, "set data_dir to a folder on another disk")
    partial = copy.with_name(f".{copy.name}.partial")
    bar = ProgressBar(total=total or None, desc=f"copying {copy.name}", unit="B", unit_scale=True, delay=2.0)

    def one(name: str) -> None:
        target, size = partial / name if name else partial, listing.sizes[name]
        if target.is_file() and target.stat().st_size == size:
            bar.update(size)
            return
        with atomic_write(target) as temporary:
            _copy_file(listing.system, listing.paths[name], size, temporary, bar)

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        with bar:
            for _ in pool.map(one, listing.paths):
                pass
    except MachineError:
        raise
    except Exception as error:  # of the file system
        problem = f"cannot be copied ({reason(error)})"
        raise UsageError(key, url, problem, "repeat the command to continue the copy") from error
    finally:
        pool.shutdown(cancel_futures=True)
    partial.rename(copy)


def _copy_file(system: Any, path: str, size: int | None, target: Path, bar: ProgressBar) -> None:
    """Copy a file; FormatError unless it has the listed size."""
    count = 0
    with system.open(path, "rb") as source, target.open("wb") as file:
        while block := source.read(BLOCK):
            count += len(block)
            if size is not None and count > size:
                break
            with writing(target):
                file.write(block)
            bar.update(len(block))
    if size is not None and count != size:
        raise FormatError(f"{path} has other than the listed {size} bytes")


def _is_network_failure(error: BaseException) -> bool:
    """Return whether an error, or the one that caused it, is that of a network, not of a server or a URL."""
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or names & NETWORK_ERRORS:
        return True
    if isinstance(error, OSError) and error.errno in UNREACHABLE:
        return True
    return error.__cause__ is not None and _is_network_failure(error.__cause__)


def _failure(error: Exception) -> tuple[str, str]:
    """Return the problem and the remedy for a URL that a server refuses, or that is wrong."""
    first = error.__cause__ or error
    status = getattr(first, "status", None)
    # fsspec reports any failure of HTTP as a missing file.
    is_http = type(first).__module__.startswith("aiohttp")
    if status in (404, 410) if is_http else isinstance(error, FileNotFoundError):
        return "does not exist", "correct the URL"
    why = f"{status} {getattr(first, 'message', '')}".strip() if status else reason(first)
    return f"cannot be read ({why})", "check the URL and your access to it"


def _name(url: str) -> str:
    """Return the last part of a URL as the name of a local file."""
    path = re.sub(r"^[^:]*://", "", url)
    path = re.split(r"[?#]", path)[0] if url.startswith("http") else path
    return re.sub(r"[^\w.+-]+", "_", path.rstrip("/").rpartition("/")[2]).lstrip(".") or "data"
