"""Addresses on the Hub, through a server that speaks its routes, with the real client: fetching, damage, no network."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import OWN, TINY, described, point_to, same_states
from tests.hub_server import COMMIT
from tools import checkpoint as commands
from util.checkpoint import hub
from util.checkpoint.runs import find_checkpoint
from util.errors import UserError


def test_a_model_goes_to_the_hub_and_comes_back_also_without_a_network(
    served, monkeypatch, tmp_path
):
    model = described()
    address = model.push_to_hub(OWN, token="hf_right", private=True)
    assert address.endswith(f"{OWN}/commit/{COMMIT}")
    assert set(served.repos[OWN]) == {"model.safetensors", "config.json", "README.md"}
    assert f'from_pretrained("{OWN}")' in served.repos[OWN]["README.md"].decode()
    with pytest.raises(
        UserError,
        match=r"there is no repository owner/repo at .*, or it is private: .*hf auth login",
    ):
        TokenBridge.from_pretrained(OWN)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert same_states(TokenBridge.from_pretrained(OWN), model)
    assert same_states(TokenBridge.from_pretrained(OWN, revision=COMMIT), model)
    assert same_states(TokenBridge.from_pretrained(f"hf://{OWN}@main"), model)
    monkeypatch.setattr(
        "time.sleep", lambda seconds: None
    )  # the client tries again, later and later
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/{revision}/{filename}",
    )
    assert same_states(TokenBridge.from_pretrained(OWN), model)
    assert same_states(TokenBridge.from_pretrained(OWN, local_files_only=True), model)
    with pytest.raises(
        UserError,
        match=r"cannot download hf://owner/other/.*: .* cannot be reached .* not in the cache",
    ):
        TokenBridge.from_pretrained("owner/other")


def test_commands_take_addresses_on_the_hub(served, run, trained, vae_path, tmp_path, capsys):
    served.add(
        OWN,
        {
            "run/checkpoint-last.pth": trained / "checkpoint-last.pth",
            "vae/own.ckpt": Path(vae_path),
        },
    )
    common = f"{TINY} --evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --keep_images"
    run(
        "main_tokenbridge",
        f"{common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/a",
    )
    hf = f"--resume hf://{OWN}/run --vae_path hf://{OWN}/vae/own.ckpt"
    for _ in range(2):
        run("main_tokenbridge", f"{common} {hf} --output_dir {tmp_path}/b")
    assert (tmp_path / "a/samples/00003.png").read_bytes() == (
        tmp_path / "b/samples/00003.png"
    ).read_bytes()
    fetched = [
        path for method, path, _ in served.asked if method == "GET" and path.startswith("/large")
    ]
    assert len(fetched) == len(set(fetched)) == 2
    capsys.readouterr()
    commands.main(["show", f"hf://{OWN}/run/checkpoint-last.pth"])
    assert "model_ema:" in capsys.readouterr().out
    commands.main(["export", f"hf://{OWN}/run", f"{tmp_path}/exported"])
    assert (tmp_path / "exported" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "address, says",
    [
        ("hf://owner", "is not an address on the Hub: write hf://owner/repo/path"),
        ("hf://owner/none/a.pth", "there is no repository owner/none"),
        ("hf://owner/repo/b.pth", r"owner/repo has no file b.pth: see .*/owner/repo/tree/main"),
        ("hf://owner/repo@v2/a.pth", r"owner/repo has no revision v2: see .*/branches"),
        ("hf://owner/repo", "owner/repo has no file model.safetensors"),
        (
            "hf://owner/gated/a.pth",
            r"owner/gated is gated: accept its terms at .*/owner/gated, then run hf auth",
        ),
        ("hf://own..er/repo/a.pth", "is not a valid name on the Hub"),
    ],
)
def test_what_cannot_be_fetched_says_why_and_what_to_type(served, address, says):
    served.add(OWN, {"a.pth": b"weights"})
    served.add("owner/gated", {"a.pth": b"weights"})
    served.gated.add("owner/gated")
    with pytest.raises(UserError, match=says):
        TokenBridge.from_pretrained(address)


@pytest.mark.parametrize(
    ("asked", "address"),
    [
        ("owner/repo", "hf://owner/repo/"),
        ("hf://owner/repo", "hf://owner/repo/"),
        ("hf://owner/repo@main/large", "hf://owner/repo@main/large"),
    ],
)
def test_a_repository_of_several_models_says_how_each_is_named(served, asked, address):
    files = (
        "a/large/checkpoint-last.pth",
        "a/huge/checkpoint-last.pth",
        "vae/kl16.ckpt",
        "README.md",
    )
    served.add(OWN, dict.fromkeys(files, b"weights"))
    root = "hf://owner/repo@main" if "@" in asked else "hf://owner/repo"
    folders = f"{root}/a/huge, {root}/a/large"
    listed = (
        f"{address} has no checkpoint-last.pth, but .* has these folders: {folders}; choose one"
    )
    with pytest.raises(UserError, match=listed):
        TokenBridge.from_pretrained(asked)
    if asked != "owner/repo":  # which is a folder for tokenizers
        with pytest.raises(UserError, match=f"has these folders: {root}/vae; choose one"):
            AutoencoderKL.from_pretrained(asked)


def test_names_that_are_neither_here_nor_on_the_hub(served, tmp_path):
    with pytest.raises(UserError, match=r"there is no file or folder no/such/folder, .*owner/repo"):
        TokenBridge.from_pretrained("no/such/folder")
    (tmp_path / "my_run").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*/my_run"):
        TokenBridge.from_pretrained(tmp_path / "my_rum")
    with pytest.raises(UserError, match=r"no checkpoint-last.pth at .*; did you mean .*/my_run"):
        find_checkpoint(tmp_path / "my_rum")
    with pytest.raises(UserError, match=r"no checkpoint-last.pth in .*; pass the file"):
        find_checkpoint(tmp_path / "my_run")
    with pytest.raises(UserError, match=r"; python -m tools.download fetches"):
        find_checkpoint("pretrained_models/tokenbridge/another")
    with pytest.raises(UserError, match="cannot write to hf://owner/repo"):
        described().push_to_hub(OWN, token="hf_wrong")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="cannot be read"):
        TokenBridge.from_pretrained(tmp_path)
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match="stores no config, and its weights have the shapes of no published model"
    ):
        TokenBridge.from_pretrained(tmp_path / "other.pth")


def test_a_connection_cut_half_way_goes_on_where_it_stopped(served):
    data = torch.randn(200_000).numpy().tobytes()
    served.add(OWN, {"a.pth": data})
    served.cut["a.pth"] = 2
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == data
    ranges = [
        asked
        for method, path, asked in served.asked
        if method == "GET" and path.startswith("/large")
    ]
    assert ranges == [None, f"bytes={len(data) // 2}-", f"bytes={len(data) * 3 // 4}-"]


def test_what_arrives_damaged_is_never_used(served):
    served.add(OWN, {"a.pth": b"weights", "config.json": b"{}"})
    served.damage = {"a.pth", "config.json"}
    for name in ("a.pth", "config.json"):
        for _ in range(2):
            with pytest.raises(
                UserError, match=f"the download of hf://owner/repo/{name} is damaged"
            ):
                hub.fetch(f"hf://{OWN}/{name}")
    served.damage.clear()
    assert hub.fetch(f"hf://{OWN}/a.pth").read_bytes() == b"weights"


def test_weights_without_their_config_are_never_guessed_at(served, vae_path, monkeypatch, tmp_path):
    commands.main(["export", str(vae_path), f"{tmp_path}/vae"])
    served.add(OWN, {path.name: path for path in (tmp_path / "vae").iterdir()})
    served.damage.add("config.json")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        AutoencoderKL.from_pretrained(f"hf://{OWN}")
    served.damage.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "snapshots" / "hub"))
    assert (
        AutoencoderKL.from_pretrained(f"hf://{OWN}")[1]
        == AutoencoderKL.from_pretrained(vae_path)[1]
    )
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
    with pytest.raises(UserError, match="is damaged: its hash"):
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
    with pytest.raises(UserError, match="has another revision than revision=v3"):
        TokenBridge.from_pretrained(f"hf://{OWN}@main", revision="v3")
    with pytest.raises(TypeError, match="TokenBridge has no arguments atn_dropout"):
        TokenBridge.from_pretrained(OWN, atn_dropout=0.3)
    assert hub.parse_address("hf://o/r@refs/pr/1/a.pth") == ("o/r", "refs/pr/1", "a.pth")
    card = str(model.generate_model_card())
    assert 'from_pretrained("owner/repo")' in card  # no KL-16: its latent factor is another
    assert "if it is elsewhere, pass its path" in card
    assert "hf://me/vae" in str(model.generate_model_card(tokenizer="hf://me/vae"))
