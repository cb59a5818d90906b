"""Find and check the checkpoint that a run resumes or evaluates."""

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

LOOKS, PAUSE = (
    12,
    5.0,
)  # how often, and after how many seconds, a folder is looked at again: networks' disks lag


def find_checkpoint(
    resume: str | Path | hub.Address, names: Sequence[str] = RUN_NAMES, **options
) -> Path:
    """The checkpoint in folder ``resume``, or ``resume`` itself (see :func:`located`); UserError if there is none."""
    path = locate(resume, names, **options)
    if not path.is_file():
        there = "in" if Path(str(resume)).is_dir() else "at"
        raise UserError(
            f"no {names[0]} {there} {resume}; name the file, or the folder that holds it"
        )
    return path


def find_checkpoint_to_resume(
    resume: str | Path, output_dir: str | Path, names: Sequence[str] = RUN_NAMES
) -> Path | None:
    """:func:`find`, or None where ``resume`` is the run's own folder and holds no checkpoint yet: a fresh start.

    If the newest checkpoint is missing but earlier ones are there, its path is returned for :func:`read_newest_whole`.
    """
    try:
        return find_checkpoint(resume, names)
    except UserError:
        if Path(resume).resolve() != Path(output_dir).resolve():
            raise
        if older_checkpoints(newest := Path(resume) / names[0]):
            return newest
        log.info("no %s in %s: starting afresh", names[0], resume)
        return None


def check_folder_is_free(output_dir: str | Path, resume: str, name: str) -> None:
    """Raises UserError if ``output_dir`` holds ``name``, another run's, and the run does not resume."""
    if not resume and (Path(output_dir) / name).exists():
        raise UserError(
            f"{output_dir} holds {name} of another run: name another --output_dir, or continue that run with "
            f"--resume {output_dir}"
        )


def run_progress(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> tuple[int, float]:
    """Return the epoch of the newest readable checkpoint in ``resume``, and the share of the next one that is done.

    The result is (-2, 0.0) if there is none. Tensors are not read.
    """
    path = locate(resume, names)
    for each in (path, *older_checkpoints(path)):
        try:
            content = read_checkpoint(each, checksums=False)
        except UserError:
            continue
        epoch, step, steps = (
            content.get(*entry) for entry in (("epoch", -1), ("step", 0), ("steps_per_epoch", 1))
        )
        if all(type(number) is int for number in (epoch, step, steps)) and steps > 0:
            return epoch, step / steps
    return -2, 0.0


def check_newest_checkpoint(resume: str | Path, names: Sequence[str] = RUN_NAMES) -> None:
    """Raise UserError, on all ranks, if another machine than that of rank 0 has a newer checkpoint.

    A run would otherwise continue from an older one, or start afresh, when rank 0 has moved to another machine. Epoch
    and step in the files decide, not their times: clocks of machines differ, and copies get new times.
    """
    for look in range(LOOKS):
        mine = run_progress(resume, names) if distributed.is_local_main_process() else (-2, 0.0)
        found = distributed.gather_objects((mine, socket.gethostname()))
        newest, host = max(found)
        if newest == found[0][0]:
            return
        if look < LOOKS - 1:
            time.sleep(PAUSE)
    distributed.raise_on_all_ranks(
        f"{host} holds a newer checkpoint in {resume} than {found[0][1]}, where process 0 runs: let process 0 run on "
        f"{host}, or put --output_dir and --resume on a disk that all machines share"
    )


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a string, None, or a list of such values."""
    return (
        value is None
        or isinstance(value, int | float | str)
        or (isinstance(value, list) and all(map(is_plain, value)))
    )


def read_run(path: str | Path) -> dict[str, Any]:
    """A TokenBridge's checkpoint: :func:`read`, with the types and ranges of its entries checked.

    Raises:
        UserError: see :func:`read`; or an entry has the wrong type or range.
    """
    return check_run(read_checkpoint(path), Path(path))


def check_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """:func:`read_run` for ``content`` that :func:`read` read from ``path``."""
    if "config" not in content and (stored := config_beside(path)):
        content |= {
            "config": stored,
            "averaged": True,
        }  # save_pretrained writes the weights that sampling uses
    if isinstance(content.get("config"), dict) and "vae" in content["config"]:
        raise UserError(f"{path} is a tokenizer, not a TokenBridge: it goes with --vae_path")
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
            f"{path} is damaged, or of another program: it cannot have such entries as {', '.join(wrong)}"
        )
    return content


def read_newest_checkpoint(path: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint at ``path``, or with a warning the newest earlier one that is whole; and its file."""
    try:
        return read_run(path), path
    except Refused:
        raise
    except UserError as error:
        for old in older_checkpoints(path):
            try:
                content = read_run(old)
            except UserError:
                continue
            log.warning("%s; continuing from the one before, %s", error, old)
            return content, old
        raise
