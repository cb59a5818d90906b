"""Fetches published models and tokenizer, FID statistics and Inception's weights to where the commands look for them.

Interrupted downloads continue where they stopped. A file gets its name only after its content was checked: that of
the Hub by its size and published hash, Inception's by its hash, another one by the checksums that it contains.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
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
#: The repositories that may have a file, and the end of its path there.
ON_THE_HUB = {
    "tokenbridge_large": ([hub.MODELS_REPO], "tokenbridge_large/checkpoint-last.pth"),
    "tokenbridge_huge": ([hub.MODELS_REPO], "tokenbridge_huge/checkpoint-last.pth"),
    "vae": ([hub.MODELS_REPO, hub.VAE_REPO], "kl16.ckpt"),
    **{file: ([repo], Path(file).name) for name, repo in TINY.items() for file in FILES[name]},
}
#: Where the commands look for the files; for Inception's weights, which are not listed, in the folder of torch's hub.
TARGETS = {
    "tokenbridge_large": "pretrained_models/tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "tokenbridge_huge": "pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth",
    "vae": "pretrained_models/vae/kl16.ckpt",
    "fid_stats": ADM_STATS,
    "reference": "fid_stats/VIRTUAL_imagenet256_labeled.npz",
    **{file: f"pretrained_models/{file}" for files in FILES.values() for file in files},
}
#: ADM's statistics of ImageNet 256 as MAR keeps them; ADM's own batch of 10,000 images with its statistics; Inception.
ELSEWHERE = {
    "fid_stats": "https://raw.githubusercontent.com/LTH14/mar/main/fid_stats/adm_in256_stats.npz",
    "reference": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz",
    "inception": URL_INCEPTION_V3,
    **{file: f"{TINY_RAW}/{Path(file).name}" for file in FILES["taef2"]},
}
#: What a command without names fetches, and all names.
DEFAULT = ("tokenbridge_large", "tokenbridge_huge", "vae", "fid_stats", "inception")
NAMES = (*DEFAULT, "reference", *FILES)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(__doc__.splitlines()[0], "tools.download")
    parser.add_argument(
        "what", nargs="*", help=f"{', '.join(NAMES)}; by default {', '.join(DEFAULT)}"
    )
    parser.add_argument(
        "--output_dir", default=".", help="holds pretrained_models/ and fid_stats/, not inception"
    )
    parser.add_argument(
        "--revision", help=f"branch, tag or commit of {hub.MODELS_REPO}; by default the newest"
    )
    return parser


def find_published(name: str, revision: str | None) -> tuple[ModelInfo, RepoSibling]:
    """The repository that has the file ``name``, and the file there; UserError if there is none or no network."""
    repos, ending = ON_THE_HUB[name]
    for repo in repos:
        place = hub.Address(repo, revision if repo == hub.MODELS_REPO else None, "")
        try:
            with hub.explained(place, "look into"):
                info = HfApi().model_info(repo, revision=place.revision, files_metadata=True)
        except UserError as error:
            if repo == repos[-1] or not isinstance(error.__cause__, RepositoryNotFoundError):
                raise
            continue
        for file in info.siblings or ():
            if f"/{file.rfilename}".endswith(f"/{ending}"):
                return info, file
    raise UserError(
        f"no file .../{ending} in {' or '.join(repos)}: see {constants.ENDPOINT}/{repos[0]}/tree/{revision or 'main'}, "
        f"and save what you find as {TARGETS[name]}"
    )


def fetch_published(name: str, target: Path, revision: str | None) -> None:
    """Fetches a file of the Hub to ``target``, and says under which licence it is."""
    info, file = find_published(name, revision)
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    licence = (
        f"its licence: {', '.join(tags)}"
        if tags
        else "it names no licence: ask its authors before you pass it on"
    )
    log.info("%s/%s at %s; %s", info.id, file.rfilename, info.sha, licence)

    def whole(path: Path) -> bool:
        expected = file.lfs.sha256 if file.lfs else file.blob_id
        return path.stat().st_size == file.size and hub.digest(path, git=not file.lfs) == expected

    url = hf_hub_url(info.id, file.rfilename, revision=info.sha, endpoint=constants.ENDPOINT)
    place = hub.Address(info.id, info.sha, file.rfilename)
    fetch(place, url, target, whole, headers=build_hf_headers(), expected_size=file.size)


def is_inception(path: Path) -> bool:
    """Return whether a file is that of Inception's weights."""
    return hub.digest(path).startswith(INCEPTION_SHA256)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint whose checksums are right."""
    try:
        return bool(read_checkpoint(path))
    except UserError:
        return False


def readable(path: Path) -> bool:
    """Whether a file holds statistics whose checksums are right."""
    try:
        return bool(read_arrays(path, "mu", "sigma"))
    except UserError:
        return False


def fetch(
    what: hub.Address | str, url: str, target: Path, whole: Callable[[Path], bool], **options
) -> None:
    """Fetches a file to ``target``, unless a whole one is there; continues an interrupted download.

    The Hub's own ``hf_hub_download`` starts from the beginning if its process was ended. ``whole`` tells whether a file
    has the right content; ``options`` are those of ``http_get``.
    """
    if target.is_file() and whole(target):
        log.info("%s is there already, and whole", target)
        return
    beside = target.with_name(f".{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (beside.is_file() and whole(beside)):
        with hub.explained(what), open(beside, "ab") as file:
            if file.tell() >= options.get("expected_size", math.inf):
                file.truncate(0)
            http_get(url, file, resume_size=file.tell(), displayed_filename=target.name, **options)
        if not whole(beside):
            beside.unlink()
            raise UserError(f"{what} arrived damaged: it is not what its origin tells; start again")
    os.replace(beside, target)
    log.info("wrote %s", target)


def fetch_file(name: str, args: argparse.Namespace) -> None:
    """Fetch one file, a key of :data:`ON_THE_HUB` or :data:`ELSEWHERE`, and log its terms."""
    target = inception_path() if name == "inception" else Path(args.output_dir) / TARGETS[name]
    if name in ON_THE_HUB:
        fetch_published(name, target, args.revision)
    elif name == "inception":
        log.info("%s, converted by torch-fidelity from TensorFlow's", ELSEWHERE[name])
        fetch(ELSEWHERE[name], ELSEWHERE[name], target, is_inception)
    elif name in FILES["taef2"]:
        log.info("%s; its license: see %s", ELSEWHERE[name], TINY_REPO)
        fetch(ELSEWHERE[name], ELSEWHERE[name], target, is_checkpoint)
    else:
        log.info("%s, made of the images of ImageNet, whose terms apply", ELSEWHERE[name])
        fetch(ELSEWHERE[name], ELSEWHERE[name], target, readable)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args(argv)
    start_log()
    unknown = [name for name in args.what if name not in NAMES]
    if unknown:
        raise UserError(
            f"nothing published is called {', '.join(unknown)}: choose from {', '.join(NAMES)}"
        )
    for name in args.what or DEFAULT:
        for file in FILES.get(name, [name]):
            fetch_file(file, args)


if __name__ == "__main__":
    errors.run(main)
