"""Weights that travel: through folders, and through a server that speaks the Hub's routes, with the real client."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import ROOT, TINY, described, same_states
from tests.hub_server import COMMIT, serving
from tools import checkpoint as commands
from tools import download
from util.checkpoint import hub
from util.errors import UserError

OWN = "owner/repo"


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A Hub of the test's own, an empty cache, and no token."""
    with serving() as server:
        point_to(monkeypatch, server.endpoint, tmp_path / "hf")
        yield server


def point_to(monkeypatch, endpoint: str, home: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what less has arrived is lost with the connection
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


# --------------------------------------------------------------------------------------------------------------------
# Folders.


def test_a_run_exports_and_its_export_is_a_checkpoint_again(run, trained, vae_path, images, tmp_path):
    figures = tmp_path / "samples.json"
    figures.write_text(json.dumps({"frechet_inception_distance": 12.5}))
    commands.main(["export", str(trained), f"{tmp_path}/model", "--figures", str(figures), "--licence", "cc0-1.0"])
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in content["model_ema"].items())
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == content["config"]
    assert "12.5" in (tmp_path / "model" / "README.md").read_text()
    commands.main(["export", str(vae_path), f"{tmp_path}/vae"])
    assert AutoencoderKL.from_pretrained(tmp_path / "vae")[1] == AutoencoderKL.from_pretrained(vae_path)[1]
    common = f"{TINY} --evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --keep_images"
    run("main_tokenbridge", f"{common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/a")
    exported = f"--resume {tmp_path}/model --vae_path {tmp_path}/vae"
    run("main_tokenbridge", f"{common} {exported} --output_dir {tmp_path}/b")
    for number in range(4):
        name = f"samples/{number:05d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(UserError, match="is there already"):
        commands.main(["export", str(trained), f"{tmp_path}/model"])
    # Everybody may read them, as far as everybody may read what is made here.
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(set(modes.values())) == 1 and modes["config.json"] == figures.stat().st_mode & 0o777


def test_evaluation_and_show_know_sizes_from_the_export_alone(run, trained, vae_path, tmp_path, capsys, caplog):
    commands.main(["export", str(trained), f"{tmp_path}/model"])
    capsys.readouterr()
    commands.main(["show", f"{tmp_path}/model"])
    assert "class_num: 4" in capsys.readouterr().out
    common = (
        "--evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --num_workers 0 --keep_images"
    )
    run("main_tokenbridge", f"{common} --resume {tmp_path}/model --vae_path {vae_path} --output_dir {tmp_path}/a")
    assert "--model tokenbridge_tiny, as the weights tell" in caplog.text
    run("main_tokenbridge", f"{TINY} {common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/b")
    assert (tmp_path / "a/samples/00002.png").read_bytes() == (tmp_path / "b/samples/00002.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("{run} {tmp}/x --figures {tmp}/empty.json", "holds no metrics"),
        ("{vae} {tmp}/x --licence mit", "is a tokenizer: --figures, --licence and --tokenizer are for a model's card"),
        ("{tmp}/nowhere {tmp}/x", "no checkpoint at"),
    ],
)
def test_exports_that_cannot_be_say_why(trained, vae_path, tmp_path, arguments, says):
    (tmp_path / "empty.json").write_text("{}")
    typed = arguments.format(run=trained, vae=vae_path, tmp=tmp_path)
    with pytest.raises(UserError, match=says):
        commands.main(["export", *typed.split()])
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------------------------
# The Hub.


def test_a_model_goes_to_the_hub_and_comes_back_also_without_a_network(served, monkeypatch, tmp_path):
    model = described()
    address = model.push_to_hub(OWN, token="hf_right", private=True)
    assert address.endswith(f"{OWN}/commit/{COMMIT}")
    assert set(served.repos[OWN]) == {"model.safetensors", "config.json", "README.md"}
    assert f'from_pretrained("{OWN}")' in served.repos[OWN]["README.md"].decode()
    with pytest.raises(UserError, match=r"there is no repository owner/repo at .*, or it is private: .*hf auth login"):
        TokenBridge.from_pretrained(OWN)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert same_states(TokenBridge.from_pretrained(OWN), model)
    assert same_states(TokenBridge.from_pretrained(OWN, revision=COMMIT), model)
    assert same_states(TokenBridge.from_pretrained(f"hf://{OWN}@main"), model)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again, later and later
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert same_states(TokenBridge.from_pretrained(OWN), model)
    assert same_states(TokenBridge.from_pretrained(OWN, local_files_only=True), model)
    with pytest.raises(UserError, match=r"cannot fetch hf://owner/other/.*: .* cannot be reached .* not in the cache"):
        TokenBridge.from_pretrained("owner/other")


def test_commands_take_addresses_on_the_hub(served, run, trained, vae_path, tmp_path, capsys):
    served.add(OWN, {"run/checkpoint-last.pth": trained / "checkpoint-last.pth", "vae/own.ckpt": Path(vae_path)})
    common = f"{TINY} --evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --keep_images"
    run("main_tokenbridge", f"{common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/a")
    hf = f"--resume hf://{OWN}/run --vae_path hf://{OWN}/vae/own.ckpt"
    for _ in range(2):
        run("main_tokenbridge", f"{common} {hf} --output_dir {tmp_path}/b")
    assert (tmp_path / "a/samples/00003.png").read_bytes() == (tmp_path / "b/samples/00003.png").read_bytes()
    fetched = [path for method, path, _ in served.asked if method == "GET" and path.startswith("/large")]
    assert len(fetched) == len(set(fetched)) == 2
    capsys.readouterr()
    commands.main(["show", f"hf://{OWN}/run/checkpoint-last.pth"])
    assert "model_ema:" in capsys.readouterr().out
    commands.main(["export", f"hf://{OWN}/run", f"{tmp_path}/exported"])
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_a_tokenizer_goes_to_the_hub_by_the_export_command(served, vae_path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    commands.main(["export", str(vae_path), f"{tmp_path}/vae", "--push_to_hub", OWN])
    assert COMMIT in capsys.readouterr().out
    vae, factor = AutoencoderKL.from_pretrained(f"hf://{OWN}")
    expected, expected_factor = AutoencoderKL.from_pretrained(vae_path)
    assert same_states(vae, expected) and factor == expected_factor


@pytest.mark.parametrize(
    "address, says",
    [
        ("hf://owner", "is no address on the Hub: write hf://owner/repo/path"),
        ("hf://owner/none/a.pth", "there is no repository owner/none"),
        ("hf://owner/repo/b.pth", r"owner/repo has no file b.pth: see .*/owner/repo/tree/main"),
        ("hf://owner/repo@v2/a.pth", r"owner/repo has no revision v2: see .*/branches"),
        ("hf://owner/repo", "owner/repo has no file model.safetensors"),
        (
            "hf://owner/gated/a.pth",
            r"owner/gated is gated: accept its terms at .*/owner/gated, then type hf auth",
        ),
        ("hf://own..er/repo/a.pth", "cannot be a name on the Hub"),
    ],
)
def test_what_cannot_be_fetched_says_why_and_what_to_type(served, address, says):
    served.add(OWN, {"a.pth": b"weights"})
    served.add("owner/gated", {"a.pth": b"weights"})
    served.gated.add("owner/gated")
    with pytest.raises(UserError, match=says):
        TokenBridge.from_pretrained(address)


def test_names_that_are_neither_here_nor_on_the_hub(served, tmp_path):
    with pytest.raises(UserError, match="no/such/folder is no file or folder here, nor owner/repo"):
        TokenBridge.from_pretrained("no/such/folder")
    with pytest.raises(UserError, match="cannot write to hf://owner/repo"):
        described().push_to_hub(OWN, token="hf_wrong")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="cannot be read"):
        TokenBridge.from_pretrained(tmp_path)
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not say of what model it is, and its weights are of no published one"):
        TokenBridge.from_pretrained(tmp_path / "other.pth")


def test_a_connection_cut_half_way_goes_on_where_it_stopped(served):
    data = torch.randn(200_000).numpy().tobytes()
    served.add(OWN, {"a.pth": data})
    served.cut["a.pth"] = 2
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == data
    ranges = [asked for method, path, asked in served.asked if method == "GET" and path.startswith("/large")]
    assert ranges == [None, f"bytes={len(data) // 2}-", f"bytes={len(data) * 3 // 4}-"]


def test_what_arrives_damaged_is_never_used(served):
    served.add(OWN, {"a.pth": b"weights", "config.json": b"{}"})
    served.damage = {"a.pth", "config.json"}
    for name in ("a.pth", "config.json"):
        for _ in range(2):
            with pytest.raises(UserError, match=f"hf://owner/repo/{name} arrived damaged"):
                hub.fetch(f"hf://{OWN}/{name}")
    served.damage.clear()
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == b"weights"


def test_weights_without_their_config_are_never_guessed_at(served, vae_path, monkeypatch, tmp_path):
    commands.main(["export", str(vae_path), f"{tmp_path}/vae"])
    served.add(OWN, {path.name: path for path in (tmp_path / "vae").iterdir()})
    served.damage.add("config.json")
    with pytest.raises(UserError, match=r"config.json arrived damaged"):
        AutoencoderKL.from_pretrained(f"hf://{OWN}")
    served.damage.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "snapshots" / "hub"))
    assert AutoencoderKL.from_pretrained(f"hf://{OWN}")[1] == AutoencoderKL.from_pretrained(vae_path)[1]
    # A file that describes itself does without, also when there is no network.
    commands.main(["convert", str(vae_path), f"{tmp_path}/own.safetensors"])
    served.add("owner/bare", {"v1.0/own.safetensors": tmp_path / "own.safetensors"})
    for endpoint in (served.endpoint, "http://127.0.0.1:9"):
        point_to(monkeypatch, endpoint, tmp_path / "hf")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        assert AutoencoderKL.from_pretrained("hf://owner/bare/v1.0/own.safetensors")[1]


def test_content_in_a_common_store_is_compared_with_the_hash_of_its_link(served, tmp_path):
    """As the client keeps what came by its faster transfer: a second link, to a name that is no hash of the content."""
    served.add(OWN, {"a.pth": b"weights"})
    path = hub.fetch(f"hf://{OWN}/a.pth")
    blob = path.parent / path.readlink()
    store = tmp_path / ("0" * 64)
    store.write_bytes(b"weights")
    blob.unlink()
    blob.symlink_to(store)
    path.unlink()  # fetched anew, the client finds the blob there
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == b"weights"
    store.write_bytes(b"weighty")
    path.unlink()
    with pytest.raises(UserError, match="arrived damaged"):
        hub.fetch(f"hf://{OWN}/a.pth")
    assert not store.exists() and not blob.is_symlink() and not path.is_symlink()
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == b"weights"


def test_arguments_of_from_pretrained_are_taken_or_refused(served, tmp_path):
    model = described()
    model.save_pretrained(tmp_path / "saved")
    served.add(OWN, {path.name: path for path in (tmp_path / "saved").iterdir()})
    for name in (OWN, f"hf://{OWN}"):
        with pytest.raises(UserError, match="has no revision v3"):
            TokenBridge.from_pretrained(name, revision="v3")
    with pytest.raises(UserError, match="names another revision than v3"):
        TokenBridge.from_pretrained(f"hf://{OWN}@main", revision="v3")
    with pytest.raises(TypeError, match="TokenBridge has no arguments atn_dropout"):
        TokenBridge.from_pretrained(OWN, atn_dropout=0.3)
    assert hub.parse("hf://o/r@refs/pr/1/a.pth") == ("o/r", "refs/pr/1", "a.pth")
    card = str(model.generate_model_card())
    assert "path/to/its/tokenizer" in card and "kl16.ckpt" not in card  # its latent factor is another
    assert "hf://me/vae" in str(model.generate_model_card(tokenizer="hf://me/vae"))


def test_a_public_repository_is_not_taken_for_a_private_one(served, trained, monkeypatch, tmp_path):
    served.add(OWN, {"README.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(UserError, match="is there already, and not private"):
        commands.main(["export", str(trained), f"{tmp_path}/model", "--push_to_hub", OWN, "--private"])
    with pytest.raises(UserError, match="is there already, and not private"):
        described().push_to_hub(OWN, private=True)
    assert set(served.repos[OWN]) == {"README.md"} and not (tmp_path / "model").exists()


# --------------------------------------------------------------------------------------------------------------------
# python -m tools.download


@pytest.fixture
def published(served, monkeypatch):
    """The published files under their names, small."""
    models = {
        "README.md": b"card",
        "tokenbridge/tokenbridge_large/checkpoint-last.pth": b"large" * 1000,
        "tokenbridge/tokenbridge_huge/checkpoint-last.pth": b"huge" * 1000,
    }
    served.add(hub.MODELS_REPO, models)
    served.add(hub.VAE_REPO, {"kl16.ckpt": b"tokenizer" * 1000})
    served.licence = "mit"
    statistics = make_statistics()
    for name, file in (("fid_stats", "stats.npz"), ("reference", "reference.npz")):
        served.elsewhere[f"/{file}"] = statistics
        monkeypatch.setitem(download.ELSEWHERE, name, f"{served.endpoint}/{file}")
    return served


def make_statistics() -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(2048), sigma=np.random.default_rng(0).random((64, 64)))
    return buffer.getvalue()


def test_download_fills_the_folders_that_the_commands_expect(published, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    download.main(["--output_dir", str(tmp_path)])
    for name, ending in (("large", b"large"), ("huge", b"huge")):
        path = tmp_path / f"pretrained_models/tokenbridge/tokenbridge_{name}/checkpoint-last.pth"
        assert path.read_bytes() == ending * 1000
    assert (tmp_path / "pretrained_models/vae/kl16.ckpt").read_bytes() == b"tokenizer" * 1000
    assert (tmp_path / "fid_stats/adm_in256_stats.npz").read_bytes() == published.elsewhere["/stats.npz"]
    assert not (tmp_path / "fid_stats/VIRTUAL_imagenet256_labeled.npz").exists()
    assert "its licence: mit" in caplog.text and COMMIT in caplog.text
    caplog.clear()
    before = len([path for method, path, _ in published.asked if method == "GET" and path.startswith("/large")])
    download.main(["--output_dir", str(tmp_path), "--revision", "main"])
    after = len([path for method, path, _ in published.asked if method == "GET" and path.startswith("/large")])
    assert caplog.text.count("is there already, and whole") == 4 and before == after
    # What is there but not whole is fetched again.
    (tmp_path / "pretrained_models/vae/kl16.ckpt").write_bytes(b"tokenizes" * 1000)
    download.main(["vae", "reference", "--output_dir", str(tmp_path)])
    assert (tmp_path / "pretrained_models/vae/kl16.ckpt").read_bytes() == b"tokenizer" * 1000
    assert (tmp_path / "fid_stats/VIRTUAL_imagenet256_labeled.npz").exists()


@pytest.mark.parametrize("name", ["vae", "fid_stats"])
def test_download_goes_on_where_it_stopped_and_refuses_what_is_damaged(published, tmp_path, name):
    target = tmp_path / download.TARGETS[name]
    file = "kl16.ckpt" if name == "vae" else "/stats.npz"
    published.damage.add(file)
    with pytest.raises(UserError, match=r"arrived damaged.*start again"):
        download.main([name, "--output_dir", str(tmp_path)])
    assert not target.exists()
    published.damage.clear()
    published.cut[file] = 1
    download.main([name, "--output_dir", str(tmp_path)])
    assert any(asked for _, _, asked in published.asked)
    expected = b"tokenizer" * 1000 if name == "vae" else published.elsewhere["/stats.npz"]
    assert target.read_bytes() == expected
    # Also what another process left, in the middle or at its end; or of another file.
    beside = target.with_name(f".{target.name}.incomplete")
    assert not beside.exists()
    for left, ranges in ((len(expected) // 3, [f"bytes={len(expected) // 3}-"]), (len(expected), [])):
        target.unlink()
        beside.write_bytes(expected[:left])
        published.asked.clear()
        download.main([name, "--output_dir", str(tmp_path)])
        assert target.read_bytes() == expected and not beside.exists()
        assert [asked for _, _, asked in published.asked if asked] == ranges * (1 + (name == "vae"))
    target.unlink()
    beside.write_bytes(b"x" * 300)
    with pytest.raises(UserError, match=r"arrived damaged"):
        download.main([name, "--output_dir", str(tmp_path)])
    download.main([name, "--output_dir", str(tmp_path)])
    assert target.read_bytes() == expected


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("nothing", "nothing published is called nothing: choose from tokenbridge_large"),
        ("tokenbridge_large --revision v9", "Epiphqny/TokenBridge has no revision v9"),
        ("tokenbridge_huge", r"no file .../tokenbridge_huge/checkpoint-last.pth in Epiphqny/TokenBridge: see .*save"),
        ("fid_stats", "cannot fetch"),
    ],
)
def test_download_says_what_it_cannot_find(published, tmp_path, arguments, says):
    published.repos[hub.MODELS_REPO].pop("tokenbridge/tokenbridge_huge/checkpoint-last.pth")
    published.elsewhere.clear()
    with pytest.raises(UserError, match=says):
        download.main([*arguments.split(), "--output_dir", str(tmp_path)])


def test_download_without_a_network(monkeypatch, tmp_path):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
    with pytest.raises(UserError, match=r"cannot look into hf://Epiphqny/TokenBridge/.*start again"):
        download.main(["--output_dir", str(tmp_path)])


def test_download_onto_a_full_disk(published, tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "from tools import download\n"
        "from util import errors\n"
        f"errors.run(lambda: download.main(['vae', '--output_dir', {str(tmp_path)!r}]))"
    )
    # What Python compiled would be cut off, too.
    environment = {"HF_ENDPOINT": published.endpoint, "HF_HOME": str(tmp_path / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "the disk is full; free space" in ended.stderr, ended.stderr
    assert not (tmp_path / "pretrained_models/vae/kl16.ckpt").exists()
