"""Starting from other weights: what fits is kept, the rest is said; and parts that are frozen."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from models.tokenbridge import TokenBridge
from tests.conftest import SMALL, TINY, filled, published_parameters, published_state
from util.checkpoint import finetune
from util.errors import UserError


def content_of(model: TokenBridge) -> tuple[dict, dict, str]:
    averages = {name: value + 1 for name, value in published_parameters(model).items()}
    return (
        {"model": published_state(model), "model_ema": averages},
        {**model.config, "latent_factor": 0.5},
        "run.pth",
    )


def start(model: TokenBridge, other: TokenBridge, ema: bool = False) -> dict[str, list[str]]:
    return finetune.start_from(model, *content_of(other), ema=ema)


def test_weights_that_fit_are_kept_whole():
    other, model = filled(TokenBridge(**SMALL)), TokenBridge(**SMALL)
    done = start(model, other)
    assert done["kept"] == list(published_parameters(model))
    assert not done["resized"] + done["reinitialized"] + done["ignored"]
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name
    start(model, other, ema=True)
    assert torch.equal(model.class_emb.weight, other.class_emb.weight + 1)


@pytest.mark.parametrize(
    "options, anew, left",
    [
        ({"class_num": 7}, {"class_emb.weight"}, set()),
        ({"quant_levels": 32}, {"token_embeddings.*.weight", "channel_heads.*.weight", "channel_heads.*.bias"}, set()),
        ({"head": "parallel"}, set(), {"token_embeddings.*.weight", "channel_mask"}),
        (
            {"channel_order": list(range(16))},
            {
                "channel_embed", "timesteps_embeddings", "token_embeddings.*.weight", "channel_heads.*.weight",
                "channel_heads.*.bias",
            },
            set(),
        ),
    ],
    ids=["classes", "levels", "parallel", "order"],
)  # fmt: skip
def test_what_does_not_fit_is_drawn_anew_and_named(options, anew, left, caplog):
    caplog.set_level(logging.INFO)
    other, model = filled(TokenBridge(**SMALL)), TokenBridge(**{**SMALL, **options})
    before = {name: value.clone() for name, value in published_parameters(model).items()}
    done = start(model, other)
    assert (
        set(finetune.grouped(done["reinitialized"])) == anew
        and set(finetune.grouped(done["ignored"])) == left
    )
    theirs = published_parameters(other)
    for name, value in published_parameters(model).items():
        assert torch.equal(
            value, before[name] if name in done["reinitialized"] else theirs[name]
        ), name
    for name in anew | left:
        assert name in caplog.text
    (option,) = options
    sides = f"{other.config[option]} in the checkpoint, {model.config[option]} in this run"
    assert f"trained differently: {option} {sides}" in caplog.text


def start_with_classes(here: list[str] | None, there: list[str] | None, rows: int = 4):
    """Class embeddings after starting from others, before, and those; and what became of the parameter."""
    other = filled(TokenBridge(**{**SMALL, "class_num": rows}))
    model = TokenBridge(**{**SMALL, "class_num": len(here) if here else 4})
    before = model.class_emb.weight.detach().clone()
    content, config, path = content_of(other)
    config |= {} if there is None else {"class_names": there}
    done = finetune.start_from(model, content, config, path, False, here)
    (kind,) = [kind for kind, names in done.items() if "class_emb.weight" in names]
    return model.class_emb.weight.detach(), before, other.class_emb.weight.detach(), kind


@pytest.mark.parametrize(
    "here, there, rows, kind",
    [
        (["ant", "bee", "cat", "dog"], ["ant", "bee", "cat", "dog"], [0, 1, 2, 3], "kept"),
        (
            ["bee", "cat", "dog", "zebra"],
            ["ant", "bee", "cat", "dog"],
            [1, 2, 3, None],
            "partly kept",
        ),
        (["asp", "dog"], ["ant", "bee", "cat", "dog"], [None, 3], "partly kept"),
        (["0", "1", "2", "3"], ["ant", "bee", "cat", "dog"], [None] * 4, "reinitialized"),
        (["images"], ["images"], [0], "kept"),
        (["images"], ["ant", "bee"], [None], "reinitialized"),
        (["bee", "cat", "dog", "zebra"], None, [0, 1, 2, 3], "kept"),
    ],
)
def test_class_embeddings_go_with_the_names_of_the_classes(here, there, rows, kind, caplog):
    caplog.set_level(logging.INFO)
    found, before, theirs, done = start_with_classes(here, there, len(there or here))
    assert torch.equal(
        found, torch.stack([before[i] if j is None else theirs[j] for i, j in enumerate(rows)])
    )
    assert done == kind and ("100.0% of the parameters kept" in caplog.text) == (None not in rows)
    if there is None:
        assert "stores no class names" in caplog.text
    else:
        kept = len(rows) - rows.count(None)
        assert f"class embeddings: {kept} of {len(rows)} kept, by the names" in caplog.text
        assert None not in rows or f"reinitialized: {here[rows.index(None)]}" in caplog.text


def test_classes_of_a_published_model_are_imagenets(monkeypatch):
    sizes = {
        name: value for name, value in SMALL.items() if name.endswith(("dim", "depth", "heads"))
    }
    monkeypatch.setattr(TokenBridge, "SIZES", {"tokenbridge_large": sizes})
    published = TokenBridge(**{**SMALL, "class_num": 1000})
    config = TokenBridge.config_of({"model": published.state_dict()}, "file.pth")
    assert config["class_names"][207] == "n02099601" and config["class_names"] == sorted(
        config["class_names"]
    )
    other = TokenBridge(**{**SMALL, "class_num": 100})
    assert "class_names" not in TokenBridge.config_of({"model": other.state_dict()}, "file.pth")


@pytest.mark.parametrize("img_size, buffer_size", [(128, 4), (32, 4), (64, 9), (128, 2)])
def test_positions_are_resized_over_the_grid(img_size, buffer_size):
    other = filled(TokenBridge(**SMALL))
    side = img_size // 16
    # A plane over the grid stays the plane, away from the borders; each buffer position is of its own number.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = (2 * rows + columns).flatten()[None, :, None].expand(-1, -1, 32)
    with torch.no_grad():
        other.backbone.output_pos_embed.copy_(plane)
        other.backbone.encoder_pos_embed_learned[:, other.backbone.buffer_size :] = plane
        other.backbone.encoder_pos_embed_learned[:, : other.backbone.buffer_size] = 5.0
    model = TokenBridge(**{**SMALL, "img_size": img_size, "buffer_size": buffer_size})
    done = start(model, other)
    expected = {"encoder_pos_embed_learned", "decoder_pos_embed_learned"}
    assert set(done["resized"]) == expected | ({"output_pos_embed"} if side != 4 else set())
    assert not done["reinitialized"]
    found = model.backbone.output_pos_embed[0, :, 0].detach().unflatten(0, (side, side))
    rows, columns = (
        (torch.arange(side) + 0.5) * 4 / side - 0.5,
        (torch.arange(side) + 0.5) * 4 / side - 0.5,
    )
    inner = (rows > 0.9) & (rows < 2.1) if side > 4 else torch.ones(side, dtype=torch.bool)
    wanted = 2 * rows[:, None] + columns
    if side >= 4:
        assert torch.allclose(found[inner][:, inner], wanted[inner][:, inner], atol=0.1)
    assert found.mean().item() == pytest.approx(plane.mean().item(), abs=0.01)
    encoder = model.backbone.encoder_pos_embed_learned[0, :, 0]
    assert torch.allclose(encoder[:buffer_size], torch.tensor(5.0))
    assert torch.equal(encoder[buffer_size:].unflatten(0, (side, side)), found)


def test_files_that_do_not_tell_their_order_or_buffer_fit_all_the_same():
    other, model = filled(TokenBridge(**SMALL)), TokenBridge(**SMALL)
    content, _, path = content_of(other)
    done = finetune.start_from(model, content, {"latent_factor": 0.2325}, path, ema=False)
    assert not done["reinitialized"]


def test_weights_of_another_model_are_refused():
    other = filled(TokenBridge(**SMALL))
    wider = TokenBridge(**{**SMALL, "encoder_embed_dim": 64, "decoder_embed_dim": 64})
    with pytest.raises(UserError, match=r"run.pth is of another model: .* Check --model"):
        start(wider, other)
    content, config, path = content_of(other)
    content["model"]["class_emb.weight"] = torch.full_like(
        content["model"]["class_emb.weight"], torch.nan
    )
    with pytest.raises(
        UserError, match=r"run.pth is damaged: class_emb.weight holds values that are not finite"
    ):
        finetune.start_from(TokenBridge(**SMALL), content, config, path, ema=False)
    with pytest.raises(UserError, match="has no weights"):
        finetune.start_from(TokenBridge(**SMALL), {}, config, path, ema=False)


def test_patterns_freeze_and_say_where_they_match_nothing():
    model = TokenBridge(**SMALL)
    finetune.freeze(model, ["encoder_blocks.*", "class_emb.weight"])
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    expected = {
        name for name, _ in model.named_parameters() if name.startswith("backbone.encoder_blocks.")
    }
    assert frozen == expected | {"backbone.class_emb.weight"}
    with pytest.raises(
        UserError, match=r"--freeze blocks.\* matches no parameter; choose from fake_latent, .*"
    ):
        finetune.freeze(model, ["blocks.*"])
    with pytest.raises(UserError, match="leaves no parameter"):
        finetune.freeze(model, ["*"])


def test_a_run_goes_on_with_other_classes_and_size_as_a_user_types_it(
    run, refused, trained, vae_path, tmp_path, caplog
):
    random = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "new" / "train" / str(label)
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )
    tiny = TINY.replace("--img_size 16", "--img_size 32").replace("--class_num 4", "--class_num 3")
    common = f"{tiny} --data_path {tmp_path}/new --vae_path {vae_path} --device cpu --lr 1e-3 --warmup_epochs 0"
    common += f" --output_dir {tmp_path}/tuned --resume {tmp_path}/tuned --finetune {trained} --freeze decoder_blocks.*"
    run("main_tokenbridge", f"{common} --epochs 1")
    for part in (
        "of the parameters kept",
        "resized: encoder_pos",
        "reinitialized: class_emb.weight",
        "frozen: ",
    ):
        assert part in caplog.text
    before = torch.load(trained / "checkpoint-last.pth", weights_only=True)["model_ema"]
    content = torch.load(tmp_path / "tuned" / "checkpoint-last.pth", weights_only=True)
    assert content["config"]["class_num"] == 3 and content["config"]["class_names"] == [
        "0",
        "1",
        "2",
    ]
    name = "decoder_blocks.0.mlp.fc1.weight"
    assert torch.equal(content["model"][name], before[name]) and torch.equal(
        content["model_ema"][name], before[name]
    )
    changed = "encoder_blocks.0.mlp.fc1.weight"
    assert not torch.equal(content["model"][changed], before[changed])
    assert torch.allclose(content["model"][changed], before[changed], atol=0.05)
    # The same command goes on with its own checkpoint; another choice of what is frozen is refused.
    caplog.clear()
    run("main_tokenbridge", f"{common} --epochs 2")
    assert "resumed from" in caplog.text and "starting from" not in caplog.text
    thawed = common.replace(" --freeze decoder_blocks.*", "")
    assert "was trained with --freeze ['decoder_blocks.*'], not nothing" in refused(
        "main_tokenbridge", f"{thawed} --epochs 3"
    )
    assert "--finetune is for training" in refused(
        "main_tokenbridge", f"{common} --evaluate --num_images 3"
    )
    small = common.replace("tokenbridge_tiny", "tokenbridge_base").replace(
        f"{tmp_path}/tuned", f"{tmp_path}/other"
    )
    assert "is of another model" in refused("main_tokenbridge", f"{small} --epochs 1")


def test_what_flags_leave_open_comes_from_the_weights(run, refused, cached, tmp_path, caplog):
    """Head, groups, quantizer and calibration of a run are those of what it starts from."""
    common = f"{TINY} --use_cached --cached_path {cached} --device cpu --lr 1e-3 --warmup_epochs 0 --epochs 1"
    first = "--head parallel --quantizer linear --quant_calibrate --channel_order sequential"
    run("main_tokenbridge", f"{common} {first} --output_dir {tmp_path}/first")
    run("main_tokenbridge", f"{common} --finetune {tmp_path}/first --output_dir {tmp_path}/second")
    configs = [
        torch.load(tmp_path / name / "checkpoint-last.pth", weights_only=True)["config"]
        for name in ("first", "second")
    ]
    assert configs[0] == configs[1] and configs[1]["head"] == "parallel"
    # Also its size and levels, of which the flags have the defaults.
    bare = (
        common.replace("--model tokenbridge_tiny ", "")
        .replace("--buffer_size 4 ", "")
        .replace("--quant_bits 3 ", "")
    )
    run("main_tokenbridge", f"{bare} --finetune {tmp_path}/first --output_dir {tmp_path}/bare")
    content = torch.load(tmp_path / "bare" / "checkpoint-last.pth", weights_only=True)
    assert content["config"] == configs[0]
    caplog.clear()
    run(
        "main_tokenbridge",
        f"{common} --head ar --finetune {tmp_path}/first --output_dir {tmp_path}/third",
    )
    assert "reinitialized: token_embeddings.*.weight" in caplog.text
    missing = refused(
        "main_tokenbridge", f"{common} --finetune {tmp_path}/nowhere --output_dir {tmp_path}/fourth"
    )
    assert "no checkpoint-last.pth" in missing
