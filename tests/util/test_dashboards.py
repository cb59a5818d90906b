"""Weights & Biases and Trackio, offline; TensorBoard is tested in test_meters.py."""

import json
import struct
import sys

import numpy as np
import pytest

from tests.scripts.conftest import pixels
from util.dashboards import RunLog, check_dashboard
from util.errors import UserError
from util.files import wait_until

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def log_twice(name: str, folder) -> None:
    """Steps 1 to 3 of a run; then, resumed after step 3, step 4 and an image."""
    for done, steps in ((0, (1, 2, 3)), (3, (4,))):
        with RunLog(name, folder, done, 2, {"lr": 0.1, "cfg": [1.0, 2.0], "path": folder}) as log:
            for step in steps:
                log.add_scalars({"train/loss": 1.0 / step}, step)
            log.add_image("samples/cfg1", IMAGE, step)


def test_trackio_has_every_step_once_with_its_epoch(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [name for name in sys.modules if name.startswith("trackio")]:
        monkeypatch.delitem(sys.modules, module)  # reads the folder when it is imported
    log_twice("trackio", tmp_path / "my_run")
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("tokenbridge") == ["my_run"]
    rows = SQLiteStorage.get_logs("tokenbridge", "my_run")
    values = {row["step"]: (row["train/loss"], row["epoch"]) for row in rows if "epoch" in row}
    assert values == {step: (1 / step, step / 2) for step in (1, 2, 3, 4)}
    shown = next(row["samples/cfg1"] for row in rows if "samples/cfg1" in row)
    assert (pixels(tmp_path / "trackio/media" / shown["file_path"]) == IMAGE).all()
    assert SQLiteStorage.get_run_config("tokenbridge", "my_run")["lr"] == 0.1
    assert "training continues without it" not in caplog.text


def history(path) -> dict[int, dict]:
    """The values of a ``.wandb`` file by step: records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows = path.read_bytes(), 7, {}  # the file's own header has 7 bytes
    while at + 7 < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a record of several parts"
        record = Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.setdefault(record.history.step.num, {}).update(values)
    return rows


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_twice("wandb", tmp_path / "my_run")
    files = sorted((tmp_path / "my_run" / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (tmp_path / "my_run" / "wandb_id").read_text()
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{run_id}"}

    def rows_of(files) -> dict[int, dict]:
        return {step: row for file in files for step, row in history(file).items()}

    wait_until(lambda: 4 in rows_of(files))  # wandb's own process writes the file
    rows = rows_of(files)
    values = {step: (row["train/loss"], row["epoch"]) for step, row in rows.items()}
    assert values == {step: (1 / step, step / 2) for step in (1, 2, 3, 4)}
    media = files[1].parent / "files" / rows[4]["samples/cfg1/path"]
    assert (pixels(media) == IMAGE).all()
    assert "training continues without it" not in caplog.text


def test_a_dashboard_that_fails_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    with RunLog("wandb", tmp_path / "file" / "run", 0, 1) as log:
        log.add_scalars({"train/loss": 1.0}, 1)
    assert caplog.text.count("cannot write the log of wandb in") == 1


def test_a_missing_package_is_told(monkeypatch):
    check_dashboard("tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    with pytest.raises(UserError, match="--log trackio needs the package trackio: pip install"):
        monkeypatch.delitem(sys.modules, "trackio", raising=False)
        check_dashboard("trackio")
