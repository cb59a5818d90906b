"""Files of the Hugging Face Hub, fetched into its cache, hashes compared; errors say what to type next."""

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

#: ``hf://owner/repo[@revision]/path``; pathlib makes one slash of two.
ADDRESS = re.compile(
    r"hf:/+(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
#: What tells a file's address from a folder's.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")


class Address(NamedTuple):
    """Where a file lies on the Hub; ``revision`` is a branch, tag or commit, None for the newest."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        if "://" in self.repo:
            return self.repo
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.path}"


def is_address(path: str | Path) -> bool:
    """Whether ``path`` names something on the Hub."""
    return str(path).startswith("hf:/")


def parse(address: str | Path) -> Address:
    """The parts of ``hf://owner/repo[@revision]/path``.

    Raises:
        UserError: it has another form.
    """
    found = ADDRESS.fullmatch(str(address))
    if found is None:
        raise UserError(
            f"{address} is no address on the Hub: write hf://owner/repo/path or hf://owner/repo@revision/path"
        )
    return Address(found["repo"], found["revision"], (found["path"] or "").strip("/"))


@contextmanager
def explained(what: Address | str, doing: str = "fetch") -> Iterator[None]:
    """Raises UserError, with what to type next, for what the Hub's client raises inside.

    Args:
        what: on the Hub, or the address of something elsewhere.
    """
    if not isinstance(what, Address):
        what = Address(what, None, "")
    here = f"{constants.ENDPOINT}/{what.repo}"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{what.repo} is gated: accept its terms at {here}, then type hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {what.repo} at {constants.ENDPOINT}, or it is private: check the name, or type "
            "hf auth login (or set HF_TOKEN) for an account that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what.repo} has no revision {what.revision}: see {here}/branches") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"cannot {doing} {what}: {constants.ENDPOINT} cannot be reached (or HF_HUB_OFFLINE is set), and the file "
            f"is not in the cache {constants.HF_HUB_CACHE}; check the network and start again"
        ) from error
    except EntryNotFoundError as error:
        tree = f"{here}/tree/{what.revision or 'main'}"
        raise UserError(f"{what.repo} has no file {what.path}: see {tree}") from error
    except HFValidationError as error:
        raise UserError(f"{what} cannot be a name on the Hub: {reason(error)}") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"cannot {doing} {what}: {reason(error)}; check the network and the account's rights (hf auth login), and "
            "start again"
        ) from error
    except Exception as error:
        # The client's connections fail in the ways of the libraries beneath, which are not always the same.
        known = isinstance(error, OSError | RuntimeError) or type(error).__module__.partition(".")[0] in CLIENTS
        if not known:
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "os error 28" in str(error):
            raise UserError(
                f"cannot {doing} {what}: the disk is full; free space, or set HF_HOME, and start again"
            ) from error
        raise UserError(f"cannot {doing} {what} ({reason(error)}); check the network and start again") from error


def digest(path: str | Path, git: bool = False) -> str:
    """SHA-256 of a file, or with ``git`` the SHA-1 that git names its content by; in hexadecimal."""
    with open(path, "rb") as file:
        if not git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        while block := file.read(2**20):
            sha1.update(block)
    return sha1.hexdigest()


def fetch(address: str | Path | Address, names: Sequence[str] = (), **options) -> Path:
    """The file at an address of the Hub, in the client's cache; if it is not there, fetched, its hash compared.

    Without a network, what the cache has is taken.

    Args:
        names: files to look for, in this order, where the address is of a folder or of the whole repository.
        options: of ``hf_hub_download``: ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        UserError: it cannot be had; the message says why, and what to type next.
    """
    place = parse(address)
    folder = not place.path.endswith(SUFFIXES)
    files = [f"{place.path}/{name}".lstrip("/") for name in names] if folder and names else [place.path]
    # Those in the cache first: without a network the client tries for long before it takes them.
    with explained(place):
        places = sorted((place._replace(path=file) for file in files), key=lambda file: cached(file, **options) is None)
    for file in places[:-1]:
        try:
            return fetch_file(file, **options)
        except UserError as error:
            if not is_missing(error):
                raise
    return fetch_file(places[-1], **options)


def is_missing(error: UserError) -> bool:
    """Whether :func:`fetch` failed because the Hub says that there is no such file."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def cached(place: Address, cache_dir: str | Path | None = None, **_) -> str | None:
    """The path of a file in the client's cache, if it is there."""
    found = try_to_load_from_cache(place.repo, place.path, cache_dir, place.revision) if place.path else None
    return found if isinstance(found, str) else None


def fetch_file(place: Address, **options) -> Path:
    """:func:`fetch` of one file."""
    if not place.path:
        raise UserError(f"{place} names no file: write hf://owner/repo/path")
    with explained(place):
        before = cached(place, **options)
        path = Path(hf_hub_download(place.repo, place.path, revision=place.revision, **options))
    # The client names content by the hash that the Hub tells, one link away; that may be a link into a common store.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if str(path) != before and len(blob.name) in (40, 64) and digest(blob, git=len(blob.name) == 40) != blob.name:
        for damaged in (blob.resolve(), blob, path):
            damaged.unlink(missing_ok=True)
        raise UserError(f"{place} arrived damaged: its hash is not what the Hub tells; start again to fetch it anew")
    return path


def fetch_beside(address: str | Path | Address, found: Path, name: str, **options) -> None:
    """Fetches ``name``, of the same commit, from beside the file ``found`` that was fetched from an address.

    Raises:
        UserError: it cannot be had; not if there is none.
    """
    place = parse(address)
    folder = place.path.removesuffix(found.name).strip("/")
    commit = found.parents[len(PurePosixPath(folder).parts)].name  # the cache has a folder for each
    beside = place._replace(revision=commit, path=f"{folder}/{name}".lstrip("/"))
    known = try_to_load_from_cache(place.repo, beside.path, options.get("cache_dir"), commit)
    if known is not None and not isinstance(known, str):  # the Hub said before that there is none
        return
    try:
        fetch_file(beside, **options)
    except UserError as error:
        if not is_missing(error):
            raise


def make_repo(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Makes a repository of a model, if there is none.

    Raises:
        UserError: there is one, which everybody can see, and it should be private.
        Others: see :func:`explained`.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(f"{repo_id} is there already, and not private: choose another name, or change its settings")


def local(path: str | Path) -> Path:
    """``path`` itself, or :func:`fetch` of an address on the Hub."""
    return fetch(path) if is_address(path) else Path(path)
