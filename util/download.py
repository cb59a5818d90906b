"""Fetches what others published into the folders that the README's commands expect: python -m util.download.

Interrupted downloads go on where they stopped. A file takes its place when it is whole: its size and hash are those
that the Hub tells; of files elsewhere, of which no hash is published, the size and their own checksums are looked at.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from util import errors, hub
from util.args import new_parser
from util.errors import UserError
from util.files import read_arrays
from util.misc import log, start_log

#: Where to: the repositories that may have it, and the end of its path there.
ON_THE_HUB = {
    "tokenbridge_large": ([hub.MODELS_REPO], "tokenbridge_large/checkpoint-last.pth"),
    "tokenbridge_huge": ([hub.MODELS_REPO], "tokenbridge_huge/checkpoint-last.pth"),
    "vae": ([hub.MODELS_REPO, hub.VAE_REPO], "kl16.ckpt"),
}
TARGETS = {
    "tokenbridge_large": "pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "tokenbridge_huge": "pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth",
    "vae": "pretrained_models/vae/kl16.ckpt",
    "fid_stats": "fid_stats/adm_in256_stats.npz",
    "reference": "fid_stats/VIRTUAL_imagenet256_labeled.npz",
}
#: ADM's statistics of ImageNet 256 as MAR keeps them, and ADM's own batch of 10,000 images with its statistics.
ELSEWHERE = {
    "fid_stats": "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
    "reference": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz",
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"{', '.join(TARGETS)}; by default all but reference (2 GB of images)")
    parser.add_argument("--output_dir", default=".", help="holds pretrained_models/ and fid_stats/")
    parser.add_argument("--revision", help=f"branch, tag or commit of {hub.MODELS_REPO}; by default the newest")
    return parser


def whole(path: Path, file: RepoSibling) -> bool:
    """Whether ``path`` has the size and hash that the Hub tells of ``file``."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return hub.digest(path) == file.lfs.sha256 if file.lfs else hub.digest(path, git=True) == file.blob_id


def find_published(name: str, revision: str | None) -> tuple[ModelInfo, RepoSibling]:
    """The repository that has the file ``name``, and the file there.

    Raises:
        UserError: none has it, or the Hub cannot be reached.
    """
    repos, ending = ON_THE_HUB[name]
    for repo in repos:
        place = hub.Address(repo, revision if repo == hub.MODELS_REPO else None, "")
        with hub.explained(place, "look into"):
            info = HfApi().model_info(repo, revision=place.revision, files_metadata=True)
        for file in info.siblings or ():
            if f"/{file.rfilename}".endswith(f"/{ending}"):
                return info, file
    raise UserError(
        f"no file .../{ending} in {' or '.join(repos)}: see {constants.ENDPOINT}/{repos[0]}/tree/{revision or 'main'}, "
        f"and save what you find as {TARGETS[name]}"
    )


def fetch_published(name: str, target: Path, revision: str | None) -> None:
    """Fetches a file of the Hub, unless it is there already.

    Raises:
        UserError: it cannot be had, or arrived damaged.
    """
    info, file = find_published(name, revision)
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    licence = (
        f"its licence: {', '.join(tags)}" if tags else "it names no licence: ask its authors before you pass it on"
    )
    log.info("%s/%s at %s; %s", info.id, file.rfilename, info.sha, licence)
    if whole(target, file):
        log.info("%s is there already, and whole", target)
        return
    beside = target.parent / ".download"
    place = hub.Address(info.id, info.sha, file.rfilename)
    with hub.explained(place):
        fetched = Path(hf_hub_download(info.id, file.rfilename, revision=info.sha, local_dir=beside))
    if not whole(fetched, file):
        fetched.unlink()
        raise UserError(f"{place} arrived damaged: its size or hash is not what the Hub tells; start again")
    os.replace(fetched, target)
    log.info("wrote %s", target)


def fetch_statistics(name: str, target: Path) -> None:
    """Fetches statistics, unless they are there already.

    Raises:
        UserError: they cannot be had, or arrived damaged.
    """
    if target.is_file():
        read_arrays(target, "mu", "sigma")
        log.info("%s is there already, and whole", target)
        return
    address = ELSEWHERE[name]
    beside = target.with_name(f".{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s, made with the images of ImageNet: its terms apply", address)
    with hub.explained(address), open(beside, "ab") as file:
        http_get(address, file, resume_size=file.tell())
    try:
        read_arrays(beside, "mu", "sigma")
    except UserError as error:
        beside.unlink()
        raise UserError(f"{address} arrived damaged ({error}); start again") from error
    os.replace(beside, target)
    log.info("wrote %s", target)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args(argv)
    start_log()
    unknown = [name for name in args.what if name not in TARGETS]
    if unknown:
        raise UserError(f"nothing published is called {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    for name in args.what or [name for name in TARGETS if name != "reference"]:
        target = Path(args.output_dir) / TARGETS[name]
        if name in ON_THE_HUB:
            fetch_published(name, target, args.revision)
        else:
            fetch_statistics(name, target)


if __name__ == "__main__":
    errors.run(main)
