"""Where a training run writes its metrics and images: TensorBoard, Weights & Biases or Trackio."""

import importlib.util
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from util.errors import UserError, reason
from util.log import log


class Dashboard(Protocol):
    """Receives the metrics and images of a run. Every call may raise any error.

    The constructor's arguments are those of :class:`RunLog`.
    """

    def __init__(self, folder: Path, steps_done: int | None, config: Mapping[str, Any]): ...

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values, by tag, of a step of the run."""

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Write an image, bytes ``[H, W, 3]``."""

    def close(self) -> None:
        """Write what remains."""


class TensorBoard:
    """A log in the run's folder, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path, steps_done: int | None, config: Mapping[str, Any]):
        threading.excepthook = report_thread
        self.writer = SummaryWriter(
            str(folder), purge_step=None if steps_done is None else steps_done + 1
        )

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Dashboard`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """See :class:`Dashboard`."""
        self.writer.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """See :class:`Dashboard`."""
        self.writer.close()


class PackageRun:
    """A run of a package with the interface of wandb; its name is that of the run's folder.

    Args:
        package: the imported package.
        options: arguments of its ``init``, beside project and name.
    """

    def __init__(self, package: Any, folder: Path, **options: Any):
        self.image = package.Image
        project = os.environ.get(f"{package.__name__.upper()}_PROJECT", PROJECT)
        self.run = package.init(project=project, name=folder.resolve().name, **options)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Dashboard`."""
        self.run.log(dict(values), step=step)

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """See :class:`Dashboard`."""
        self.run.log({tag: self.image(image)}, step=step)

    def close(self) -> None:
        """See :class:`Dashboard`."""
        self.run.finish()


class WandB(PackageRun):
    """A run of Weights & Biases.

    Its settings are wandb's own environment variables: WANDB_PROJECT, WANDB_MODE, WANDB_ENTITY, ...
    """

    def __init__(self, folder: Path, steps_done: int | None, config: Mapping[str, Any]):
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        super().__init__(
            wandb,
            folder,
            id=id_file.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )


class Trackio(PackageRun):
    """A run of Trackio; ``trackio show`` opens it.

    Its settings are Trackio's own environment variables, such as TRACKIO_DIR and TRACKIO_SPACE_ID,
    and TRACKIO_PROJECT.
    """

    def __init__(self, folder: Path, steps_done: int | None, config: Mapping[str, Any]):
        import trackio

        super().__init__(
            trackio,
            folder,
            resume="never" if steps_done == 0 else "allow",  # runs are found by their name
            config={name: plain(value) for name, value in config.items()},
            embed=False,
        )


#: By the name of ``--log``.
DASHBOARDS: dict[str, type[Dashboard]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
#: Project of the runs, unless an environment variable names another one.
PROJECT = "tokenbridge"


def check_dashboard(name: str) -> None:
    """Raise UserError if the package of a dashboard is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--log {name} needs the package {name}: pip install {name}")


class RunLog:
    """A dashboard that never ends a run; a context manager.

    Values that cannot be written are dropped, with one warning. After :data:`PAUSE` seconds the
    dashboard is opened again.

    Args:
        name: a key of :data:`DASHBOARDS`.
        folder: the folder of the run's log.
        steps_done: steps of the run so far. TensorBoard hides values of later steps in the folder's
            earlier logs, written before the run resumed from this step.
        steps_per_epoch: every value comes with its ``epoch``, a share of which may be done.
        config: the flags of the run.
    """

    PAUSE = 60.0

    def __init__(
        self,
        name: str,
        folder: str | Path,
        steps_done: int,
        steps_per_epoch: int,
        config: Mapping[str, Any] | None = None,
    ):
        self.name, self.folder = name, Path(folder)
        self.steps_per_epoch = steps_per_epoch
        self.config = config or {}
        self.closed_until = -math.inf
        self.warned = False
        self.purge_from: int | None = steps_done
        self.dashboard: Dashboard | None = None
        self._try(lambda dashboard: None)  # opens it

    def _try(self, call: Callable[[Dashboard], None]) -> None:
        """Call ``call`` with the dashboard; open it first if necessary."""
        if time.monotonic() < self.closed_until:
            return
        try:
            if self.dashboard is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                opened = DASHBOARDS[self.name](self.folder, self.purge_from, self.config)
                self.dashboard, self.purge_from = opened, None
            call(self.dashboard)
        except Exception as error:
            # Also an error of the dashboard's own thread, which a later call raises.
            if not self.warned:
                log.warning(
                    "cannot write the log of %s in %s (%s); training continues without it, and "
                    "tries again",
                    self.name,
                    self.folder,
                    reason(error),
                )
            self.warned = True
            self.closed_until = time.monotonic() + self.PAUSE
            self.dashboard = None

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values, by tag, of a step of the run, and its epoch."""
        values = {**values, "epoch": step / self.steps_per_epoch}
        self._try(lambda dashboard: dashboard.add_scalars(values, step))

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Write an image, bytes ``[H, W, 3]``."""
        self._try(lambda dashboard: dashboard.add_image(tag, image, step))

    def close(self) -> None:
        """Write what remains."""
        self._try(lambda dashboard: dashboard.close())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def plain(value: Any) -> Any:
    """Return a flag's value as JSON has it: paths and other objects as text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def report_thread(args: Any) -> None:
    """Print the traceback of a thread's exception, except of an OSError.

    TensorBoard raises an OSError of its thread in the next call.
    """
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
