"""Files are whole or untouched, also on a full disk, and never out of their folder."""

import os
import resource

import pytest
import torch

import engine_tokenbridge
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import filled
from tests.processes import forked
from util import errors
from util.checkpoint.files import save_checkpoint
from util.errors import UserError
from util.files import inside, remove_parts, write_json, written_whole


def test_files_are_whole_or_untouched(tmp_path):
    path = tmp_path / "new" / "file"
    with written_whole(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), written_whole(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    with (
        pytest.raises(UserError, match="cannot write"),
        written_whole(path / "below a file") as file,
    ):
        pass


def test_only_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    names = [".a.npz.123.part", "a.part", ".a.part", "a.npz.123.part", ".a.npz.12x.part"]
    for name in names:
        (tmp_path / name).touch()
    remove_parts(tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_checkpoint(path, {"model": torch.zeros(100_000)}, keep_last=2),
        lambda path: write_json(path, "x" * 200_000),
    ],
    ids=["checkpoint", "JSON"],
)
def test_a_full_disk_is_an_error_that_keeps_the_old_file(tmp_path, write, capfd):
    path = tmp_path / "checkpoint-last.pth"
    save_checkpoint(path, {"model": torch.ones(3)})
    before = path.read_bytes()

    def fill(rank: int) -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, 100_000)
        )  # writing on fails, as on a full disk
        errors.run(lambda: write(path))

    assert forked(1, fill)[1] == [2]
    said = capfd.readouterr().err
    assert said.startswith(f"error: cannot write {path}: File too large") and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["checkpoint-last.pth"] and path.read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a/../x"])
def test_names_that_leave_their_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out of"):
        inside(tmp_path, name)
    vae = Tokenizer(filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1)), 1.0)
    batches = [(torch.zeros(1, 3, 8, 8), None, [name], torch.zeros(1, 32).byte())]
    if name:
        with pytest.raises(UserError, match="leads out of"):
            engine_tokenbridge.cache_latents(vae, batches, tmp_path / "cache", torch.device("cpu"))
    assert not list(tmp_path.rglob("*.npz"))
