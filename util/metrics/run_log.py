"""Read the TensorBoard log of a training run."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.errors import UserError


def logged_scalars(folder: str | Path, tag: str) -> dict[int, float]:
    """Return the values of a tag by step.

    Raises:
        UserError: the folder has no log with this tag.
    """
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()  # all values
    if tag not in log.Tags()["scalars"]:
        raise UserError(f"no TensorBoard log of {tag} in {folder}")
    return {event.step: event.value for event in log.Scalars(tag)}


def epoch_means(losses: Mapping[int, float], epoch_steps: int) -> list[float]:
    """Return the mean loss of each complete epoch.

    Args:
        losses: by step; each is the mean since the previous one, and one is at every epoch's end.
        epoch_steps: steps per epoch.
    """
    weighted, previous = [], 0
    for step, loss in losses.items():
        weighted.append(((step - 1) // epoch_steps, (step - previous) * loss))
        previous = step
    epochs = groupby(weighted, key=lambda entry: entry[0])
    means = [sum(loss for _, loss in group) / epoch_steps for _, group in epochs]
    return means[: previous // epoch_steps]
