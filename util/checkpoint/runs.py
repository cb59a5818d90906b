"""Find and check checkpoints: to resume a run, to evaluate, and for ``from_pretrained``."""

import difflib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util import distributed
from util.checkpoint import hub
from util.checkpoint.files import (
    RUN_NAMES,
    Refused,
    config_beside,
    locate,
    older_checkpoints,
    read_checkpoint,
)
from util.errors import UserError
from util.log import log

#: A folder is checked up to this many times, this many seconds apart: network disks have a delay.
LOOKS, PAUSE = 12, 5.0

#: The progress of a folder without a readable checkpoint.
NO_PROGRESS = (-2, 0.0)


def hint(path: str | Path | hub.Address) -> str:
    """Return what a missing ``path`` may be instead, or how to download it; empty if unknown."""
    path = Path(str(path))
    if not path.exists() and path.parent.is_dir():
        siblings = [str(sibling) for sibling in path.parent.iterdir()]
        if close := difflib.get_close_matches(str(path), siblings, n=1):
            return f"did you mean {close[0]}?"
    if "pretrained_models" in path.parts:
        return "python -m tools.download fetches the published models"
    return ""


def find_checkpoint(
    resume: str | Path | hub.Address, names: Sequence[str] = RUN_NAMES, **options
) -> Path:
    """Return the checkpoint in folder ``resume``, or ``resume`` itself if it is a file.

    The arguments are those of :func:`util.checkpoint.files.locate`.

    Raises:
        UserError: there is no checkpoint.
    """
    path = locate(resume, names, **options)
    if not path.is_file():
        preposition = "in" if Path(str(resume)).is_dir() else "at"
        remedy = hint(resume) or "pass the file, or the folder that contains it"
        raise UserError(f"no {names[0]} {preposition} {resume}; {remedy}")
    return path


def find_pretrained(
    model: str | Path, revision: str | None = None, **options
) -> tuple[Path, str | Path | hub.Address]:
    """Return the checkpoint of ``from_pretrained``, and the path or address where it was found.

    Args:
        model, revision: see :meth:`models.tokenbridge.TokenBridge.from_pretrained`.
        options: of :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: there is no such model.
    """
    source: str | Path | hub.Address = model
    if not hub.is_address(model) and not Path(model).exists():
        if remedy := hint(model):
            raise UserError(f"there is no file or folder {model}; {remedy}")
        if str(model).count("/") != 1:
            raise UserError(
                f"there is no file or folder {model}, and it is not a repository (owner/repo) on "
                "the Hub"
            )
        if Path(model).parent.is_dir():
            raise UserError(
                f"there is no file or folder {model}; for a repository on the Hub, write "
                f"hf://{model}"
            )
        log.info("there is no file or folder %s: looking for this repository on the Hub", model)
        source = f"hf://{model}"
    if hub.is_address(source) and revision is not None:
        address = hub.parse_address(source)
        if address.revision not in (None, revision):
            raise UserError(
                f"{source} has another revision than revision={revision}: pass only one of them"
            )
        source = address._replace(revision=revision)
    try:
        return find_checkpoint(source, **options), source
    except UserError as error:
        if not hub.is_address(source) or hub.is_address(model):
            raise
        raise UserError(f"there is no local folder {model}; on the Hub: {error}") from error


def find_checkpoint_to_resume(
    resume: str | Path, output_dir: str | Path, names: Sequence[str] = RUN_NAMES
) -> Path | None:
    """Return :func:`find_checkpoint`; None if the run's own folder has no checkpoint yet.

    If the newest checkpoint is missing but earlier ones exist, the path of the newest is returned
    for :func:`read_newest_checkpoint`.

    Raises:
        UserError: ``resume`` is another folder than ``output_dir``, and has no checkpoint.
    """
    try:
        return find_checkpoint(resume, names)
    except UserError:
        if Path(resume).resolve() != Path(output_dir).resolve():
            raise
        newest = Path(resume) / names[0]
        if older_checkpoints(newest):
            return newest
        log.info("no %s in %s: starting a new run", names[0], resume)
        return None


def check_folder_is_free(output_dir: str | Path, resume: str, name: str) -> None:
    """Raise UserError if a run that does not resume would overwrite ``name`` in ``output_dir``."""
    if not resume and (Path(output_dir) / name).exists():
        raise UserError(
            f"{output_dir} contains {name} of another run: choose another --output_dir, or "
            f"continue that run with --resume {output_dir}"
        )


def run_progress(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> tuple[int, float]:
    """Return the last finished epoch of the newest readable checkpoint, and the share of the next.

    The result is :data:`NO_PROGRESS` if there is no such checkpoint. Tensors are not read.
    """
    newest = locate(resume, names)
    for path in (newest, *older_checkpoints(newest)):
        try:
            content = read_checkpoint(path, checksums=False)
        except UserError:
            continue
        epoch = content.get("epoch", -1)
        step = content.get("step", 0)
        steps = content.get("steps_per_epoch", 1)
        if all(type(number) is int for number in (epoch, step, steps)) and steps > 0:
            return epoch, step / steps
    return NO_PROGRESS


def check_newest_checkpoint(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> None:
    """Raise UserError, on all ranks, if another machine has a newer checkpoint than rank 0's.

    When rank 0 moves to another machine, the run would otherwise continue from an older checkpoint,
    or start again. Epoch and step are compared, not file times: the clocks of machines differ, and
    copies get new times.
    """
    for attempt in range(LOOKS):
        is_reader = distributed.is_local_main_process()
        progress = run_progress(resume, names) if is_reader else NO_PROGRESS
        all_progress = distributed.gather_objects((progress, socket.gethostname()))
        newest, newest_host = max(all_progress)
        rank_0_progress, rank_0_host = all_progress[0]
        if newest == rank_0_progress:
            return
        if attempt < LOOKS - 1:
            time.sleep(PAUSE)
    distributed.raise_on_all_ranks(
        f"{newest_host} has a newer checkpoint in {resume} than {rank_0_host}, where rank 0 runs: "
        f"run rank 0 on {newest_host}, or put --output_dir and --resume on a disk that all "
        "machines share"
    )


def is_plain(value: Any) -> bool:
    """Return whether ``value`` is a number, a string, None, or a list of such values."""
    return (
        value is None
        or isinstance(value, int | float | str)
        or (isinstance(value, list) and all(map(is_plain, value)))
    )


def read_run(path: str | Path) -> dict[str, Any]:
    """Return the content of a TokenBridge checkpoint, with types and ranges checked.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`; or an entry has the wrong type
            or range.
    """
    return check_run(read_checkpoint(path), Path(path))


def check_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``content``, read from ``path``, after the checks of :func:`read_run`."""
    if "config" not in content and (stored := config_beside(path)):
        # save_pretrained writes the EMA under "model".
        content |= {"config": stored, "averaged": True}
    if isinstance(content.get("config"), dict) and "vae" in content["config"]:
        raise UserError(f"{path} is a tokenizer, not a TokenBridge: pass it as --vae_path")
    lowest = {"epoch": -1, "step": 0, "steps_per_epoch": 1, "world_size": 1, "average_steps": 0}
    numbers = {name: content[name] for name in lowest if name in content}
    wrong = [
        name for name, value in numbers.items() if type(value) is not int or value < lowest[name]
    ]
    if not wrong and content.get("step", 0) > content.get("steps_per_epoch", 1):
        wrong.append("step")
    if type(content.get("ema_warmup", True)) is not bool:
        wrong.append("ema_warmup")
    wrong += [
        name
        for name in ("optimizer", "scaler", "config")
        if not isinstance(content.get(name, {}), dict)
    ]
    if "config" not in wrong:
        config = content.get("config", {})
        wrong += [
            f"config.{name}"
            for name, value in config.items()
            if not isinstance(name, str) or not is_plain(value)
        ]
        if not isinstance(config.get("latent_factor", 1.0), float | int):
            wrong.append("config.latent_factor")
    if wrong:
        raise UserError(
            f"{path} is damaged, or of another program: these entries have a wrong type or range: "
            f"{', '.join(wrong)}"
        )
    return content


def read_newest_checkpoint(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the checkpoint at ``path`` and its file; the newest readable earlier one if damaged.

    A warning reports that an earlier checkpoint is used.
    """
    try:
        return read_run(path), path
    except Refused:
        raise
    except UserError as error:
        for older in older_checkpoints(path):
            try:
                content = read_run(older)
            except UserError:
                continue
            log.warning("%s; continuing from the previous checkpoint, %s", error, older)
            return content, older
        raise
