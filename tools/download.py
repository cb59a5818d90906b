"""Download published models and tokenizer, FID statistics and Inception weights.

The files are written to where the commands look for them. Interrupted downloads continue. A file
gets its name only after a check of its content: files of the Hub by size and published hash,
Inception by its hash, statistics and TAEF2 by the checksums that the file contains.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers

from util import errors
from util.args import new_parser
from util.checkpoint import hub
from util.checkpoint.files import HUB_CONFIG, VAE_NAMES, read_checkpoint
from util.errors import UserError
from util.files import read_arrays
from util.log import log, start_log
from util.metrics.inception import INCEPTION_SHA256, URL_INCEPTION_V3, inception_path
from util.metrics.tables import ADM_STATS

#: Tiny autoencoders: folders of diffusers on the Hub, except TAEF2, a pair of files on GitHub.
TINY_REPO = "https://github.com/madebyollin/taesd"
TINY_RAW = "https://raw.githubusercontent.com/madebyollin/taesd/main"
TINY = {name: f"madebyollin/{name}" for name in ("taesd", "taesdxl", "taesd3", "taef1")}
#: The files of each name that has several.
FILES = {
    **{name: [f"{name}/{file}" for file in (HUB_CONFIG, VAE_NAMES[-1])] for name in TINY},
    "taef2": ["taef2/taef2_encoder.pth", "taef2/taef2_decoder.pth"],
}
#: Repositories of the Hub that may have a file, and the end of its path in the repository.
ON_THE_HUB = {
    "tokenbridge_large": ([hub.MODELS_REPO], "tokenbridge_large/checkpoint-last.pth"),
    "tokenbridge_huge": ([hub.MODELS_REPO], "tokenbridge_huge/checkpoint-last.pth"),
    "vae": ([hub.MODELS_REPO, hub.VAE_REPO], "kl16.ckpt"),
    **{file: ([repo], Path(file).name) for name, repo in TINY.items() for file in FILES[name]},
}
#: Paths at which the commands look for the files. Inception is in the cache of torch.hub instead.
TARGETS = {
    "tokenbridge_large": "pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "tokenbridge_huge": "pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth",
    "vae": "pretrained_models/vae/kl16.ckpt",
    "fid_stats": ADM_STATS,
    "reference": "fid_stats/VIRTUAL_imagenet256_labeled.npz",
    **{file: f"pretrained_models/{file}" for files in FILES.values() for file in files},
}
#: Addresses of the other files.
ELSEWHERE = {
    # ADM's statistics of ImageNet at 256 pixels, from MAR's repository
    "fid_stats": "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
    # ADM's batch of 10,000 images and its statistics
    "reference": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
    "imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    "inception": URL_INCEPTION_V3,
    **{file: f"{TINY_RAW}/{Path(file).name}" for file in FILES["taef2"]},
}
#: The names that are downloaded by default, and all names.
DEFAULT = ("tokenbridge_large", "tokenbridge_huge", "vae", "fid_stats", "inception")
NAMES = (*DEFAULT, "reference", *FILES)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__.splitlines()[0], "tools.download")
    parser.add_argument(
        "what",
        nargs="*",
        help=f"files to download: {', '.join(NAMES)}; by default {', '.join(DEFAULT)}",
    )
    parser.add_argument(
        "--output_dir",
        default=".",
        help="folder of pretrained_models/ and fid_stats/; does not apply to inception",
    )
    parser.add_argument(
        "--revision", help=f"branch, tag or commit of {hub.MODELS_REPO}; by default the newest"
    )
    return parser


def find_published(name: str, revision: str | None) -> tuple[ModelInfo, RepoSibling]:
    """Return the repository of the Hub that has the file ``name``, and the file.

    Raises:
        UserError: no repository has the file, or the Hub cannot be reached.
    """
    repos, ending = ON_THE_HUB[name]
    for repo in repos:
        address = hub.Address(repo, revision if repo == hub.MODELS_REPO else None, "")
        try:
            with hub.explained(address, "look into"):
                info = HfApi().model_info(repo, revision=address.revision, files_metadata=True)
        except UserError as error:
            if repo == repos[-1] or not isinstance(error.__cause__, RepositoryNotFoundError):
                raise
            continue
        for file in info.siblings or ():
            if f"/{file.rfilename}".endswith(f"/{ending}"):
                return info, file
    raise UserError(
        f"no file .../{ending} in {' or '.join(repos)}: look for it at "
        f"{constants.ENDPOINT}/{repos[0]}/tree/{revision or 'main'}, "
        f"and save it as {TARGETS[name]}"
    )


def download_published(name: str, target: Path, revision: str | None) -> None:
    """Download a file of the Hub to ``target``, and log its license."""
    info, file = find_published(name, revision)
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    if tags:
        license_note = f"license: {', '.join(tags)}"
    else:
        license_note = "the repository names no license: ask the authors before you redistribute it"
    log.info("%s/%s at %s; %s", info.id, file.rfilename, info.sha, license_note)

    def is_complete(path: Path) -> bool:
        expected = file.lfs.sha256 if file.lfs else file.blob_id
        return path.stat().st_size == file.size and hub.digest(path, git=not file.lfs) == expected

    url = hf_hub_url(info.id, file.rfilename, revision=info.sha, endpoint=constants.ENDPOINT)
    address = hub.Address(info.id, info.sha, file.rfilename)
    download_file(
        address, url, target, is_complete, headers=build_hf_headers(), expected_size=file.size
    )


def is_inception(path: Path) -> bool:
    """Return whether a file holds the Inception weights."""
    return hub.digest(path).startswith(INCEPTION_SHA256)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint with correct checksums."""
    try:
        return bool(read_checkpoint(path))
    except UserError:
        return False


def is_statistics(path: Path) -> bool:
    """Return whether a file holds FID statistics with correct checksums."""
    try:
        return bool(read_arrays(path, "mu", "sigma"))
    except UserError:
        return False


def download_file(
    address: hub.Address | str,
    url: str,
    target: Path,
    is_complete: Callable[[Path], bool],
    **options,
) -> None:
    """Download a file to ``target``, unless it is complete; continue an interrupted download.

    ``hf_hub_download`` cannot replace this: it starts again if its process was killed.

    Args:
        address: of the file, for messages.
        is_complete: returns whether a file has the expected content.
        options: of ``http_get``.

    Raises:
        UserError: the download failed, or its content is not the expected one.
    """
    if target.is_file() and is_complete(target):
        log.info("%s exists already and is complete", target)
        return
    partial = target.with_name(f".{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (partial.is_file() and is_complete(partial)):
        with hub.explained(address), open(partial, "ab") as file:
            if file.tell() >= options.get("expected_size", math.inf):
                file.truncate(0)  # it is damaged
            http_get(url, file, resume_size=file.tell(), displayed_filename=target.name, **options)
        if not is_complete(partial):
            partial.unlink()
            raise UserError(f"{address} arrived damaged: its size or hash is wrong; download again")
    os.replace(partial, target)
    log.info("wrote %s", target)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_args_parser().parse_args(argv)
    start_log()
    unknown = [name for name in args.what if name not in NAMES]
    if unknown:
        raise UserError(
            f"no published file is called {', '.join(unknown)}: choose from {', '.join(NAMES)}"
        )
    names = args.what or DEFAULT
    for name in chain.from_iterable(FILES.get(key, [key]) for key in names):
        target = inception_path() if name == "inception" else Path(args.output_dir) / TARGETS[name]
        if name in ON_THE_HUB:
            download_published(name, target, args.revision)
            continue
        url = ELSEWHERE[name]
        if name == "inception":
            log.info("%s, converted by torch-fidelity from TensorFlow's", url)
            download_file(url, url, target, is_inception)
        elif name in FILES["taef2"]:
            log.info("%s; for its license see %s", url, TINY_REPO)
            download_file(url, url, target, is_checkpoint)
        else:
            log.info("%s, computed from ImageNet, whose terms of use apply", url)
            download_file(url, url, target, is_statistics)


if __name__ == "__main__":
    errors.run(main)
