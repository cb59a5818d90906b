"""Files of the Hugging Face Hub: fetched into its client's cache, their hashes compared."""

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

#: Where the paper's models are, and MAR's copy of the KL-16 tokenizer.
MODELS_REPO, VAE_REPO = "Epiphqny/TokenBridge", "xwen99/mar-vae-kl16"

CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: ``hf://owner/repo[@revision]/path``; of the two slashes pathlib leaves one.
ADDRESS = re.compile(
    r"hf:/+(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
#: An address whose path ends otherwise is a folder's.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")


class Address(NamedTuple):
    """Where a file lies on the Hub; ``revision`` is a branch, tag or commit, None for the newest."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.path}"


def is_address(path: str | Path | Address) -> bool:
    """Whether ``path`` names something on the Hub."""
    return str(path).startswith("hf:/")


def parse(address: str | Path | Address) -> Address:
    """The parts of ``hf://owner/repo[@revision]/path``; UserError if ``address`` has another form."""
    found = ADDRESS.fullmatch(str(address))
    if found is None:
        form = "hf://owner/repo/path or hf://owner/repo@revision/path"
        raise UserError(f"{address} is no address on the Hub: write {form}")
    return Address(found["repo"], found["revision"], (found["path"] or "").strip("/"))


def advice(error: Exception, what: Address | str, doing: str) -> str | None:
    """What to tell the user about an error of the Hub's client; None for errors that are not of the Hub or network."""
    repo, revision, path = what if isinstance(what, Address) else (what, None, "")
    here = f"{constants.ENDPOINT}/{repo}"
    match error:
        case GatedRepoError():
            return f"{repo} is gated: accept its terms at {here}, then type hf auth login"
        case RepositoryNotFoundError():
            return (
                f"there is no repository {repo} at {constants.ENDPOINT}, or it is private: check the name, or type "
                "hf auth login (or set HF_TOKEN) for an account that may read it"
            )
        case RevisionNotFoundError():
            return f"{repo} has no revision {revision}: see {here}/branches"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return (
                f"cannot {doing} {what}: {constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set), and the "
                f"file is not in the cache {constants.HF_HUB_CACHE}; check the network and start again"
            )
        case EntryNotFoundError():
            return f"{repo} has no file {path}: see {here}/tree/{revision or 'main'}"
        case HFValidationError():
            return f"{what} cannot be a name on the Hub: {reason(error)}"
        case HfHubHTTPError():
            todo = "check the network and the account's rights (hf auth login), and start again"
            return f"cannot {doing} {what}: {reason(error)}; {todo}"
    if getattr(error, "errno", None) in DISK_FULL or "os error 28" in str(error):
        return (
            f"cannot {doing} {what}: the disk is full; free space, or set HF_HOME, and start again"
        )
    # Below the client, connections fail with errors of several libraries.
    if (
        isinstance(error, OSError | RuntimeError)
        or type(error).__module__.partition(".")[0] in CLIENTS
    ):
        return f"cannot {doing} {what} ({reason(error)}); check the network and start again"
    return None


@contextmanager
def explained(what: Address | str, doing: str = "fetch") -> Iterator[None]:
    """Turns errors of the Hub's client in its block into UserErrors that say what to type next.

    Args:
        what: the file or repository, for the message; a URL for a file that is not on the Hub.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = advice(error, what, doing)
        if message is None:
            raise
        raise UserError(message) from error


def digest(path: str | Path, git: bool = False) -> str:
    """SHA-256 of a file in hexadecimal, or with ``git`` the SHA-1 by which git names its content."""
    with open(path, "rb") as file:
        if not git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        while block := file.read(2**20):
            sha1.update(block)
    return sha1.hexdigest()


def fetch(address: str | Path | Address, names: Sequence[str] = (), **options) -> Path:
    """Where the client's cache holds the file at an address of the Hub; one that it lacks is fetched first.

    The hash of what was fetched is compared. Without a network the file of the cache is taken.

    Args:
        names: files to look for, in this order, where the address is of a folder or of the whole repository.
        options: of ``hf_hub_download``: ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        UserError: the file cannot be fetched; the message says why, and what to type next.
    """
    place = parse(address)
    folder = not place.path.endswith(SUFFIXES)
    files = (
        [f"{place.path}/{name}".lstrip("/") for name in names] if folder and names else [place.path]
    )
    # Those in the cache first: without a network the client tries the others for long.
    with explained(place):
        places = sorted(
            (place._replace(path=file) for file in files),
            key=lambda file: cached(file, **options) is None,
        )
    for file in places[:-1]:
        if found := fetch_if_there(file, **options):
            return found
    try:
        return fetch_file(places[-1], **options)
    except UserError as error:
        if (
            folder
            and names
            and is_missing(error)
            and (there := holders(place, names, options.get("token")))
        ):
            raise UserError(
                f"{place} holds no {names[0]}, but there is {', '.join(there)}: name one"
            ) from error
        raise


def holders(place: Address, names: Sequence[str], token: str | bool | None) -> list[str]:
    """Return the addresses of those folders in the repository of ``place`` that hold one of ``names``."""
    with explained(place, "look into"):
        files = HfApi(token=token).model_info(place.repo, revision=place.revision).siblings or ()
    paths = [PurePosixPath(file.rfilename) for file in files]
    folders = {str(path.parent).removeprefix(".") for path in paths if path.name in names}
    return sorted(str(place._replace(path=folder)).rstrip("/") for folder in folders)


def cached(place: Address, cache_dir: str | Path | None = None, **_) -> str | None:
    """The path of a file in the client's cache, None if it is not there."""
    found = (
        try_to_load_from_cache(place.repo, place.path, cache_dir, place.revision)
        if place.path
        else None
    )
    return found if isinstance(found, str) else None


def fetch_file(place: Address, **options) -> Path:
    """The path of one file in the client's cache, see :func:`fetch`."""
    if not place.path:
        raise UserError(f"{place} names no file: write hf://owner/repo/path")
    with explained(place):
        before = cached(place, **options)
        path = Path(hf_hub_download(place.repo, place.path, revision=place.revision, **options))
    # The client's link leads to a file, or a link into a common store, whose name is the hash that the Hub tells.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if (
        str(path) != before
        and len(blob.name) in (40, 64)
        and digest(blob, git=len(blob.name) == 40) != blob.name
    ):
        for damaged in (blob.resolve(), blob, path):
            damaged.unlink(missing_ok=True)
        raise UserError(
            f"{place} arrived damaged: its hash is not what the Hub tells; start again to fetch it anew"
        )
    return path


def fetch_if_there(place: Address, **options) -> Path | None:
    """:func:`fetch_file`, or None if the Hub says that there is no such file."""
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


def fetch_beside(address: str | Path | Address, found: Path, name: str, **options) -> None:
    """Fetches ``name``, if there is such a file, from the folder and commit of ``found``, fetched from ``address``."""
    place = parse(address)
    folder = place.path.removesuffix(found.name).strip("/")
    commit = found.parents[
        len(PurePosixPath(folder).parts)
    ].name  # the cache has a folder for each commit
    beside = place._replace(revision=commit, path=f"{folder}/{name}".lstrip("/"))
    known = try_to_load_from_cache(place.repo, beside.path, options.get("cache_dir"), commit)
    if known is None or isinstance(known, str):  # else the cache remembers that the Hub has none
        fetch_if_there(beside, **options)


def make_repo(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Makes a model's repository, if there is none; UserError if one should be private but is already public."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(
            f"{repo_id} is there already, and not private: choose another name, or change its settings"
        )
