"""Download files from the Hugging Face Hub into its client's cache, and verify their hashes."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from util.errors import UserError, reason

#: The repositories of the paper's models, and of MAR's copy of the KL-16 tokenizer.
MODELS_REPO, VAE_REPO = "Epiphqny/TokenBridge", "xwen99/mar-vae-kl16"

CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: ``hf://owner/repo[@revision]/path``; pathlib reduces the two slashes to one.
ADDRESS = re.compile(
    r"hf:/+(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
#: Suffixes of files. An address with another ending is a folder.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")


class Address(NamedTuple):
    """A file or folder on the Hub. ``revision`` is a branch, tag or commit; None is the newest."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.path}"


def is_address(path: str | Path | Address) -> bool:
    """Return whether ``path`` is an address on the Hub."""
    return str(path).startswith("hf:/")


def parse_address(address: str | Path | Address) -> Address:
    """Return the parts of ``hf://owner/repo[@revision]/path``; UserError for another form."""
    match = ADDRESS.fullmatch(str(address))
    if match is None:
        form = "hf://owner/repo/path or hf://owner/repo@revision/path"
        raise UserError(f"{address} is not an address on the Hub: write {form}")
    return Address(match["repo"], match["revision"], (match["path"] or "").strip("/"))


def connection_advice(error: Exception, target: Address | str, action: str) -> str | None:
    """Return a message for the user about an error of the Hub's client or of the network.

    The result is None for all other errors.

    Args:
        target: the file or repository.
        action: the verb of the message, such as "download".
    """
    repo, revision, path = target if isinstance(target, Address) else (target, None, "")
    url = f"{constants.ENDPOINT}/{repo}"
    match error:
        case GatedRepoError():
            return f"{repo} is gated: accept its terms at {url}, then run hf auth login"
        case RepositoryNotFoundError():
            return (
                f"there is no repository {repo} at {constants.ENDPOINT}, or it is private: check "
                "the name, or run hf auth login (or set HF_TOKEN) for an account that can read it"
            )
        case RevisionNotFoundError():
            return f"{repo} has no revision {revision}: see {url}/branches"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return (
                f"cannot {action} {target}: {constants.ENDPOINT} cannot be reached (or "
                f"HF_HUB_OFFLINE is set), and the file is not in the cache "
                f"{constants.HF_HUB_CACHE}; check the network and start again"
            )
        case EntryNotFoundError():
            return f"{repo} has no file {path}: see {url}/tree/{revision or 'main'}"
        case HFValidationError():
            return f"{target} is not a valid name on the Hub: {reason(error)}"
        case HfHubHTTPError():
            return (
                f"cannot {action} {target}: {reason(error)}; check the network and the "
                "permissions of the account (hf auth login), and start again"
            )
    if getattr(error, "errno", None) in DISK_FULL or "os error 28" in str(error):
        return (
            f"cannot {action} {target}: the disk is full; free space, or set HF_HOME to another "
            "disk, and start again"
        )
    # Failed connections raise the errors of several libraries below the client.
    from_client = type(error).__module__.partition(".")[0] in CLIENTS
    if isinstance(error, OSError | RuntimeError) or from_client:
        return f"cannot {action} {target} ({reason(error)}); check the network and start again"
    return None


@contextmanager
def explained(target: Address | str, action: str = "download") -> Iterator[None]:
    """Convert errors of the Hub's client in the block into UserErrors that say what to do.

    Args:
        target: the file or repository, for the message; a URL for a file outside the Hub.
        action: the verb of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = connection_advice(error, target, action)
        if message is None:
            raise
        raise UserError(message) from error


def digest(path: str | Path, git: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal; with ``git``, the SHA-1 of its git blob."""
    with open(path, "rb") as file:
        if not git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        while block := file.read(2**20):
            sha1.update(block)
    return sha1.hexdigest()


def fetch(address: str | Path | Address, names: Sequence[str] = (), **options) -> Path:
    """Return the path of a Hub file in the client's cache; download the file if it is missing.

    The hash of a downloaded file is verified. Without a network the cached file is used.

    Args:
        names: file names to look for, in this order, if the address is a folder or a repository.
        options: of ``hf_hub_download``: ``token``, ``cache_dir``, ``force_download``,
            ``local_files_only``.

    Raises:
        UserError: the file cannot be downloaded. The message says why, and what to do.
    """
    place = parse_address(address)
    in_folder = bool(names) and not place.path.endswith(SUFFIXES)
    paths = [f"{place.path}/{name}".lstrip("/") for name in names] if in_folder else [place.path]
    # Cached files first: without a network the client takes long to give up on the others.
    with explained(place):
        files = sorted(
            (place._replace(path=path) for path in paths),
            key=lambda file: cached(file, **options) is None,
        )
    for file in files[:-1]:
        if local_path := fetch_if_there(file, **options):
            return local_path
    try:
        return fetch_file(files[-1], **options)
    except UserError as error:
        if not in_folder or not is_missing(error):
            raise
        folders = folders_with(place, names, options.get("token"))
        if not folders:
            raise
        raise UserError(
            f"{place} has no {names[0]}, but the repository has these folders: "
            f"{', '.join(folders)}; choose one"
        ) from error


def folders_with(place: Address, names: Sequence[str], token: str | bool | None) -> list[str]:
    """Return the addresses of all folders of the repository that contain one of ``names``."""
    with explained(place, "list"):
        files = HfApi(token=token).model_info(place.repo, revision=place.revision).siblings or ()
    paths = [PurePosixPath(file.rfilename) for file in files]
    folders = {str(path.parent).removeprefix(".") for path in paths if path.name in names}
    return sorted(str(place._replace(path=folder)).rstrip("/") for folder in folders)


def cached(place: Address, cache_dir: str | Path | None = None, **_) -> str | None:
    """Return the path of a file in the client's cache; None if it is not cached."""
    if not place.path:
        return None
    path = try_to_load_from_cache(place.repo, place.path, cache_dir, place.revision)
    return path if isinstance(path, str) else None


def fetch_file(place: Address, **options) -> Path:
    """Return the path of one file in the client's cache; see :func:`fetch`."""
    if not place.path:
        raise UserError(f"{place} does not name a file: write hf://owner/repo/path")
    with explained(place):
        path_before = cached(place, **options)
        path = Path(hf_hub_download(place.repo, place.path, revision=place.revision, **options))
    # The cache entry links to a file, or to a link into a shared store, whose name is the hash that
    # the Hub reports.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    is_new = str(path) != path_before
    has_hash = len(blob.name) in (40, 64)
    if is_new and has_hash and digest(blob, git=len(blob.name) == 40) != blob.name:
        for damaged in (blob.resolve(), blob, path):
            damaged.unlink(missing_ok=True)
        raise UserError(
            f"the download of {place} is damaged: its hash differs from the one on the Hub; start "
            "again to download it again"
        )
    return path


def fetch_if_there(place: Address, **options) -> Path | None:
    """Return :func:`fetch_file`, or None if the Hub reports that there is no such file."""
    try:
        return fetch_file(place, **options)
    except UserError as error:
        if is_missing(error):
            return None
        raise


def is_missing(error: UserError) -> bool:
    """Return whether an error of :func:`fetch_file` says that the Hub has no such file."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def fetch_beside(address: str | Path | Address, fetched: Path, name: str, **options) -> None:
    """Download ``name``, if it exists, from the same folder and commit as a downloaded file.

    Args:
        address: the address that was downloaded.
        fetched: its path in the cache.
    """
    place = parse_address(address)
    folder = place.path.removesuffix(fetched.name).strip("/")
    # The cache has a folder for each commit.
    commit = fetched.parents[len(PurePosixPath(folder).parts)].name
    beside = place._replace(revision=commit, path=f"{folder}/{name}".lstrip("/"))
    cache_entry = try_to_load_from_cache(place.repo, beside.path, options.get("cache_dir"), commit)
    # Any other entry records that the Hub has no such file.
    if cache_entry is None or isinstance(cache_entry, str):
        fetch_if_there(beside, **options)


def make_repo(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Create a model repository if it does not exist.

    Raises:
        UserError: ``private`` is True, and the repository exists and is public.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(
            f"{repo_id} already exists and is public: choose another name, or make it private in "
            "its settings"
        )
