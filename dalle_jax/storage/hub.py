"""Files of repositories on a hub, by default huggingface.co: "hf://owner/name", "hf://owner/name@revision/file".

The package huggingface_hub (`pip install -e '.[hub]'`) downloads. It keeps files in its cache and resumes connections
that break. It reads the usual variables: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. A slash in the name of a
revision is written %2F.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from absl import logging

from dalle_jax.errors import ConfigError, DamagedError, HubError, UserError
from dalle_jax.storage.errors import storage_cause

SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://(?P<owner>[\w-][\w.-]*)/(?P<name>[\w-][\w.-]*)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?", re.ASCII
)
_REPO = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"/models--([\w-][\w.-]*?)--([\w-][\w.-]*)/snapshots/([0-9a-f]+)/?$", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "huggingface_hub", "hf_xet")
_LISTED = 20  # files in a message


class MissingFile(HubError):
    """A repository does not hold a file."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a file or a repository is.

    Attributes:
      repo: "owner/name".
      revision: branch, tag or commit; None for the main branch.
      file: path inside the repository; None for the whole repository.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def is_hub(path: Any) -> bool:
    """Returns whether a path is on a hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def parse(path: str) -> Address:
    """Parses "hf://owner/name[@revision][/file]".

    Raises:
      ConfigError: it is something else.
    """
    found = _ADDRESS.fullmatch(path)
    if found is None or any(part in ("", ".", "..") for part in (found["file"] or "x").split("/")):
        raise ConfigError(
            f"{path!r} cannot be read; expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION, or one with /FILE."
        )
    revision = found["revision"] and urllib.parse.unquote(found["revision"])
    return Address(f"{found['owner']}/{found['name']}", revision, found["file"])


def is_repository(path: str) -> bool:
    """Returns whether a path is "hf://owner/name" or "hf://owner/name@revision"."""
    found = _ADDRESS.fullmatch(path)
    return found is not None and found["file"] is None


def name_of(path: str) -> str:
    """Returns the address, with its commit, of a folder in the cache; other paths are returned unchanged."""
    found = _CACHED.search(path.replace(os.sep, "/"))
    return f"{SCHEME}{found[1]}/{found[2]}@{found[3]}" if found else path


def check_repo(name: str, flag: str) -> None:
    """Raises a `ConfigError` unless a name is "owner/name"."""
    if not _REPO.fullmatch(name):
        raise ConfigError(f"{flag}={name} cannot be used; expected OWNER/NAME, the name of a repository.")


def download(address: Address) -> str:
    """Downloads a file, or finds it in the cache.

    Args:
      address: of the file.

    Returns:
      Its path on this machine. The folder above the file's own path is named after the commit.

    Raises:
      HubError: the package is missing, there is no such repository, revision or file, it needs a login, or the hub
        cannot be reached.
      DamagedError: the file is not the one that the hub lists.
    """
    package = _package()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    with _errors(package, address):
        path = package.hf_hub_download(
            address.repo, address.file, revision=address.revision, endpoint=_endpoint(), local_files_only=offline
        )
    return path


def download_checked(path: str) -> str:
    """Downloads a file of weights, and compares it with the SHA-256 under which the hub lists it, if it does.

    Args:
      path: "hf://owner/name[@revision]/file".

    Returns:
      Its path on this machine.

    Raises:
      ConfigError: the path names no file.
      UserError: see `download`.
    """
    address = parse(path)
    if address.file is None:
        raise ConfigError(f"{path} names no file: give hf://OWNER/NAME/FILE. {listing(address)}")
    found = download(address)
    with open(found, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    listed = os.path.basename(os.path.realpath(found))  # the cache names files so
    if _SHA256.fullmatch(listed) and listed != digest:
        raise DamagedError(
            f"{path} was downloaded as {found} and is damaged: its SHA-256 is {digest}, and the hub lists {listed}. "
            "Delete that file and run the same command again."
        )
    logging.info("%s: %s, %d bytes, SHA-256 %s", path, found, os.path.getsize(found), digest)
    return found


def listing(address: Address) -> str:
    """Says in a sentence which files a repository holds, for messages."""
    package = _package()
    try:
        names = package.HfApi(endpoint=_endpoint()).list_repo_files(address.repo, revision=address.revision)
    except Exception:  # the message is about something else
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"It holds {', '.join(sorted(names)[:_LISTED])}{more}."


def push(folder: str, repo: str, private: bool) -> str:
    """Uploads a folder to a repository, which is created if it does not exist.

    Args:
      folder: a local folder.
      repo: "owner/name".
      private: whether a new repository is private.

    Returns:
      The address of the commit.

    Raises:
      HubError: the package is missing, a login is needed, or the hub cannot be reached.
    """
    package = _package()
    with _errors(package, Address(repo)):
        api = package.HfApi(endpoint=_endpoint())
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of dalle_jax"))


def _endpoint() -> str | None:
    """Returns HF_ENDPOINT, which huggingface_hub alone would read only when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _package() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors  # not loaded by the first line
    except ImportError as error:
        raise HubError(
            "Addresses of a hub (hf://…) and --push need the package huggingface_hub: pip install -e '.[hub]'."
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _errors(package: Any, address: Address) -> Iterator[None]:
    """Turns the errors of the package inside the block into a `HubError` that says what to do."""
    kinds, whole = package.errors, Address(address.repo, address.revision)
    try:
        yield
    except UserError:
        raise
    except kinds.GatedRepoError as error:
        raise HubError(
            f"{address.repo} gives its files only to those who accepted its conditions: accept them on the page of the "
            "repository, log in (hf auth login) or set HF_TOKEN, and run the same command again."
        ) from error
    except kinds.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repository {address.repo}, or it is private. Check its name; for a private one log in "
            "(hf auth login) or set HF_TOKEN."
        ) from error
    except kinds.RevisionNotFoundError as error:
        raise HubError(f"{address.repo} has no revision {address.revision!r}: give another @REVISION.") from error
    except kinds.LocalEntryNotFoundError as error:
        raise HubError(
            f"{address} is not in the cache ({package.constants.HF_HUB_CACHE}), and the hub cannot be reached: check "
            "the network and HF_HUB_OFFLINE, or download the file elsewhere and give its path."
        ) from error
    except kinds.EntryNotFoundError as error:
        raise MissingFile(f"{whole} has no file {address.file!r}. {listing(whole)}") from error
    except Exception as error:
        if cause := _status(error) or storage_cause(error):
            raise HubError(f"{address}: {cause}. Run the same command again.") from error
        if type(error).__module__.split(".")[0] in _CLIENTS or isinstance(error, ConnectionError):
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise HubError(f"{address}: the connection failed ({said}). Run the same command again.") from error
        raise


def _status(error: Exception) -> str | None:
    """Describes an answer of the hub that allows nothing; None for other errors."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "the login is missing, or it may not do this: log in (hf auth login) or set HF_TOKEN"
    return f"the hub answers with status {status}" if status else None
