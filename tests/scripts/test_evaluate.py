"""What evaluation.py samples, searches, measures and writes, alone and during training."""

import json
import os
import shutil
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import chunks_of
from models.tokenbridge import TokenBridge, tokenbridge_tiny
from models.vae import AutoencoderKL
from tests.conftest import FID, IS, TINY, filled, load, write_images
from tests.processes import start_script
from tests.scripts.conftest import BASE, FACTOR, all_pixels, averaged, grey, pictures, pixels
from util import distributed
from util.data.images import LINE, confidence_maps, to_uint8
from util.rng import image_seeds

# --------------------------------------------------------------------------------------------------------------------
# Sampling.


def test_every_flag_of_sampling_reaches_the_sampler(run, weights, tmp_path, sampler, decoder):
    flags = {
        "num_iter": 3, "cfg": 2.5, "cfg_schedule": "constant", "temperature": 0.7, "order": "confidence",
        "confidence_noise": 0.4, "first_place": "released",
    }  # fmt: skip
    typed = " ".join(f"--{name} {value}" for name, value in flags.items())
    common = f"{weights} --evaluate --no_metrics --num_images 8 {typed}"
    run(
        "main_tokenbridge",
        f"{common} --eval_bsz 3 --output_dir {tmp_path}/a --precision fp16 --vae_precision fp32",
    )
    for call in sampler.calls:
        assert {name: call[name] for name in flags} == flags and call["autocast"] == torch.float16
        assert torch.equal(call["mask_token"], averaged(tmp_path / "weights"))
    assert sampler.all("bsz") == [3, 3, 2]
    assert [int(label) for label in sampler.joined("labels")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(decoder.all("autocast")) == {torch.float32}
    seeds = sampler.joined("seeds")
    assert len(set(seeds)) == 8

    sampler.calls.clear()
    run(
        "main_tokenbridge",
        f"{common} --eval_bsz 8 --output_dir {tmp_path}/b --no_ema --precision fp32",
    )
    (call,) = sampler.calls
    assert call["seeds"] == seeds and call["autocast"] == torch.float32
    assert torch.equal(call["mask_token"], averaged(tmp_path / "weights", part="model"))
    run(
        "main_tokenbridge",
        f"{common} --eval_bsz 8 --output_dir {tmp_path}/c --gen_seed 9 --precision fp16",
    )
    assert not set(sampler.calls[-1]["seeds"]) & set(seeds)
    assert (
        decoder.calls[-1]["autocast"] == torch.float16
    )  # as sampled, where nothing else is asked for


def test_pictures_are_of_the_unscaled_latents_each_under_its_number(
    run, weights, tmp_path, sampler, decoder
):
    common = f"{weights} --evaluate --no_metrics --num_images 120 --eval_bsz 50 --output_dir {tmp_path}/out"
    run("main_tokenbridge", f"{common} --precision fp32 --save_npz")
    folder = tmp_path / "out" / "samples"
    for number in (0, 29, 30, 59, 60, 99, 119):
        assert (pixels(folder / f"{number:05d}.png") == grey(number // 30)).all(), number
    grid = pixels(tmp_path / "out" / "samples.png")
    for place in range(100):  # of 120, evenly spaced, ten in a row
        cell = grid[2 + place // 10 * (66 + LINE) :, 2 + place % 10 * 66 :][:64, :64]
        assert (cell == grey(place * 120 // 100 // 30)).all(), place
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [grey(number // 30) for number in range(120)]


def test_only_what_is_missing_is_sampled_again(run, weights, tmp_path, sampler, decoder):
    common = f"{weights} --evaluate --no_metrics --num_images 8 --eval_bsz 2 --save_confidence"
    common += f" --output_dir {tmp_path}/out"
    run("main_tokenbridge", common)
    folder = tmp_path / "out" / "samples"
    (folder / "00002.png").unlink()
    (folder.with_name("samples-confidence") / "00005.png").unlink()
    sampler.calls.clear()
    run("main_tokenbridge", common)
    assert [int(label) for label in sampler.joined("labels")] == [1, 1, 2, 2]
    sampler.calls.clear()
    run("main_tokenbridge", common)
    assert not sampler.calls


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_images_are_of_the_weights_whatever_the_files_name_size_and_time(
    run, weights, vae_path, tmp_path, sampler, decoder, part
):
    common = f"{weights} --evaluate --no_metrics --num_images 4 --output_dir {tmp_path}/out"
    run("main_tokenbridge", common)
    path = vae_path if part == "tokenizer" else tmp_path / "weights" / "checkpoint-last.pth"
    content = torch.load(path, weights_only=True)
    torch.save(content, path)  # at another time
    before = path.stat()
    run("main_tokenbridge", common)
    assert len(sampler.calls) == 1
    state, name = (
        (content["model"], "post_quant_conv.bias")
        if part == "tokenizer"
        else (content["model_ema"], "mask_token")
    )
    state[name] += 1
    torch.save(content, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    run("main_tokenbridge", common)
    assert len(sampler.calls) == 2


def test_images_of_another_run_go_and_what_else_lies_there_stays_and_is_not_measured(
    run, weights, tmp_path, sampler, decoder
):
    common = f"{weights} --evaluate --no_metrics --output_dir {tmp_path}/out --save_npz"
    run("main_tokenbridge", f"{common} --num_images 8 --save_confidence")
    folder, maps = tmp_path / "out" / "samples", tmp_path / "out" / "samples-confidence"
    others = ["12.png", "mine.png", "notes.txt", ".ipynb_checkpoints/00000.png"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 3)).save(folder / name, format="png")
    for flags, left in (("--save_confidence", 4), ("", 0)):
        run("main_tokenbridge", f"{common} --num_images 4 {flags}")
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert there == {*(f"{n:05d}.png" for n in range(4)), *others}
        assert len(list(maps.glob("*"))) == left
        with np.load(tmp_path / "out" / "samples.npz") as arrays:
            assert arrays["arr_0"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize(
    "name",
    [
        "samples-cfg2-t1/00003.png",
        "samples-cfg2-t1-confidence/00000.png",
        "samples-cfg2-t1.json",
        "after",
    ],
)
def test_what_this_project_has_not_made_is_neither_removed_nor_replaced(
    run, refused, weights, tmp_path, sampler, decoder, name
):
    """Of a search's second pair; or images beyond those of the run before."""
    common = f"{weights} --evaluate --no_metrics --output_dir {tmp_path}/out --cfg 1 2"
    if name == "after":
        run("main_tokenbridge", f"{common} --num_images 4")
        name = "samples-cfg2-t1/00004.png"
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    sampler.calls.clear()
    line = refused("main_tokenbridge", f"{common} --num_images 8")
    assert f"{path} was not made by this project" in line and "another --output_dir" in line
    assert path.read_bytes() == b"mine" and not sampler.calls


def test_confidence_is_pictured_where_its_token_lies(run, weights, tmp_path, sampler, decoder):
    run(
        "main_tokenbridge",
        f"{weights} --evaluate --no_metrics --num_images 4 --save_confidence --output_dir {tmp_path}/out",
    )
    brightness = (
        pixels(tmp_path / "out" / "samples-confidence" / "00003.png").astype(int).sum(axis=2)
    )
    cells = brightness[2::4, 2::4]  # 16 tokens, 4 pixels wide each
    assert (np.diff(cells.flatten()) > 0).all() and len(np.unique(brightness)) == 16
    # Every map from its own lowest value to its own highest.
    maps = confidence_maps(torch.tensor([[[-4.0, -2.0]], [[-400.0, -200.0]]]), 2)
    assert (
        torch.equal(maps[0], maps[1])
        and maps[0, :, 0, 0].tolist() == [68, 1, 84]
        and maps[0, 1, 0, 1] == 231
    )


def test_numbers_of_images_that_would_fit_are_told(refused, weights, tmp_path):
    for asked, fitting in {10: 8, 11: 12, 1: 4}.items():
        line = refused(
            "main_tokenbridge",
            f"{weights} --evaluate --num_images {asked} --output_dir {tmp_path}/out",
        )
        assert f"such as {fitting}" in line


def test_two_processes_share_the_work_and_measure_once(
    run, run_two, weights, tmp_path, sampler, decoder, quick_inception, monkeypatch
):
    """One run by both: what is sampled, measured, written and removed."""
    monkeypatch.setattr(
        "util.metrics.compute.fid_statistics_to_metric",
        lambda a, b, **_: {FID: abs(a["mu"] - b["mu"]).sum()},
    )
    note = sampler.note

    def noted(*args, **kwargs):  # a file hears of the other process, too
        given = note(*args, **kwargs)
        with open(tmp_path / "chunks", "a") as file:
            file.write(f"{distributed.get_rank()} {given['labels'].tolist()}\n")
        return given

    monkeypatch.setattr(sampler, "note", noted)
    reference = write_images(tmp_path / "reference", size=16) / "train"
    for path in reference.rglob("*.png"):
        Image.fromarray(pixels(path)[:16]).save(path)
    common = f"{weights} --evaluate --num_images 12 --eval_bsz 2 --reference {reference} {quick_inception.flag}"
    common += " --cfg 1 2 --num_workers 0"
    run_two("main_tokenbridge", f"{common} --output_dir {tmp_path}/two")
    chunks = sorted((tmp_path / "chunks").read_text().splitlines())
    once = ["0 [0, 0]", "0 [1, 1]", "0 [2, 3]", "1 [0, 1]", "1 [2, 2]", "1 [3, 3]"]
    assert chunks == sorted(2 * once)
    assert (
        sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == []
    )  # measured, and removed
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/one")
    one, two = (
        json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two")
    )
    assert len(one) == 2 and one[0]["images"] == 12 and {"precision", "recall"} <= set(one[0])
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# What is sampled, whatever the processes, chunks and interruptions.


def test_images_depend_neither_on_processes_nor_on_interruption(run, run_two, weights, tmp_path):
    common = (
        f"{weights} --evaluate --no_metrics --num_images 24 --num_iter 8 --cfg 2.0 --precision fp32"
    )
    run("main_tokenbridge", f"{common} --eval_bsz 7 --output_dir {tmp_path}/one")
    one = pictures(tmp_path / "one" / "samples")
    assert len(one) == 24 == len(set(one))

    # The number of threads changes sums: all of these have one.
    serial = start_script(
        "main_tokenbridge",
        f"{common} --eval_bsz 7 --output_dir {tmp_path}/serial",
        tmp_path / "log",
    )
    serial.join()
    assert serial.exitcode == 0, (tmp_path / "log").read_text()
    run_two("main_tokenbridge", f"{common} --eval_bsz 7 --output_dir {tmp_path}/two")
    assert pictures(tmp_path / "two" / "samples") == pictures(tmp_path / "serial" / "samples")

    # Killed half-way, then continued: images that were there stay, the others are the same.
    process = start_script(
        "main_tokenbridge", f"{common} --eval_bsz 2 --output_dir {tmp_path}/cut", tmp_path / "log"
    )
    folder = tmp_path / "cut" / "samples"
    while not (folder.is_dir() and len(list(folder.glob("*.png"))) >= 6) and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 6 <= len(before) < 24
    run("main_tokenbridge", f"{common} --eval_bsz 2 --output_dir {tmp_path}/cut")
    whole_chunks = [p for p in before if folder / f"{int(p.stem) ^ 1:05d}.png" in before]
    assert all(path.stat().st_mtime_ns == before[path] for path in whole_chunks)
    run("main_tokenbridge", f"{common} --eval_bsz 2 --output_dir {tmp_path}/uncut")
    assert pictures(folder) == pictures(tmp_path / "uncut" / "samples")


def test_chunk_sizes_change_rounding_only(run, weights, tmp_path):
    common = f"{weights} --evaluate --no_metrics --num_images 20 --num_iter 16 --cfg 2.0 --precision fp32"
    sizes = {}
    for size in (1, 7, 20):
        run("main_tokenbridge", f"{common} --eval_bsz {size} --output_dir {tmp_path}/{size}")
        sizes[size] = all_pixels(tmp_path / str(size) / "samples")
    for size in (1, 7):
        assert sum(np.array_equal(a, b) for a, b in zip(sizes[size], sizes[20], strict=True)) >= 19


def test_images_of_other_settings_or_weights_are_replaced(run, weights, tmp_path, caplog):
    caplog.set_level("INFO")
    common = f"{weights} --evaluate --no_metrics --num_images 4 --num_iter 2 --output_dir {tmp_path}/out --eval_bsz 4"
    folder = tmp_path / "out" / "samples"
    seen = []
    for flags in ("", "--gen_seed 1", "--gen_seed 1 --no_ema", "--gen_seed 1 --no_ema"):
        run("main_tokenbridge", f"{common} {flags}")
        seen.append(pictures(folder))
    assert seen[0] != seen[1] != seen[2] == seen[3]
    assert (
        caplog.text.count("replacing the images of another run") == 2
        and "gen_seed was 0, now 1" in caplog.text
    )


def test_evaluation_writes_the_same_pictures_every_time(run, trained, vae_path, tmp_path):
    common = f"{TINY} --vae_path {vae_path} --evaluate --no_metrics --resume {trained} --num_images 8 --num_iter 4 --cfg 2.0"
    pictures = []
    for chunk, seed in ((8, 0), (3, 0), (8, 1)):
        out = tmp_path / f"eval{chunk}-{seed}"
        run(
            "main_tokenbridge",
            f"{common} --eval_bsz {chunk} --gen_seed {seed} --output_dir {out} --precision fp32",
        )
        assert sorted(os.listdir(out / "samples")) == [f"{i:05d}.png" for i in range(8)]
        pictures.append(
            [np.array(Image.open(out / "samples" / f"{i:05d}.png"), dtype=int) for i in range(8)]
        )
        with Image.open(out / "samples.png") as grid:
            assert grid.size == (8 * 66 + 2, 66 + LINE + 2)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], pictures[1], strict=True)) <= 1
    assert any(np.abs(a - b).max() > 1 for a, b in zip(pictures[0], pictures[2], strict=True))
    # What is pictured: the average's samples of every class, two each, with their seeds and the flags.
    content = load(trained)
    model = TokenBridge.from_content(content, trained, ema=True)
    vae, factor = AutoencoderKL.from_pretrained(vae_path)
    labels, seeds = torch.arange(8) // 2, image_seeds(0, range(8))
    with torch.no_grad():
        latents = model.sample_tokens(8, 4, 2.0, labels=labels, seeds=seeds)
        expected = to_uint8(vae.decode(latents / factor)).permute(0, 2, 3, 1).numpy().astype(int)
    assert max(np.abs(a - b).max() for a, b in zip(pictures[0], expected, strict=True)) <= 1


@pytest.mark.parametrize("flag, key", [("", "model_ema"), ("--no_ema", "model")])
def test_evaluation_samples_from_averages_or_weights_and_divides_by_the_factor(
    run, train, vae_path, tmp_path, trace, flag, key
):
    folder = train("run", "--epochs 1 --ema_rate 0.5")
    trace.clear()
    how = "--num_images 8 --num_iter 3 --cfg 2.5 --temperature 0.8 --cfg_schedule constant --eval_bsz 4 --gen_seed 3"
    out = f"--resume {folder} --output_dir {tmp_path}/out --vae_path {vae_path}"
    run("main_tokenbridge", f"{BASE} {out} --evaluate --no_metrics {how} {flag}")
    content = load(folder)
    expected = {"num_iter": 3, "cfg": 2.5, "temperature": 0.8, "cfg_schedule": "constant"}
    for sampled in trace.sampled:
        assert {name: sampled[name] for name in expected} == expected
        assert torch.equal(sampled["class_emb"], content[key]["class_emb.weight"])
    assert torch.cat([sampled["labels"] for sampled in trace.sampled]).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert len({seed for sampled in trace.sampled for seed in sampled["seeds"]}) == 8
    latents = torch.cat([sampled["latents"] for sampled in trace.sampled])
    assert torch.allclose(torch.cat(trace.decoded), latents / FACTOR)


# --------------------------------------------------------------------------------------------------------------------
# Refused.


def test_guidance_of_a_model_trained_without_it_is_refused(
    run, refused, weights, images, vae_path, tmp_path, sampler, decoder
):
    path = tmp_path / "weights" / "checkpoint-last.pth"
    content = torch.load(path, weights_only=True)
    content["config"]["label_drop_prob"] = 0  # as a whole number, too
    torch.save(content, path)
    shutil.copy(vae_path, tmp_path / "weights" / "vae.ckpt")
    model = f"--resume {tmp_path}/weights --device cpu"
    tiny = f"{TINY} --data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/run --epochs 1 --device cpu"
    cases = {
        f"main_tokenbridge {weights} --evaluate --no_metrics --num_images 4 --output_dir {tmp_path}/out --cfg 1 3": 3,
        f"main_tokenbridge {tiny} --online_eval --no_metrics --num_images 4 --label_drop_prob 0 --cfg 2": 2,
        f"tools.figures samples {model} --vae_path {vae_path} --output {tmp_path}/out.png --classes 0": 3,
        f"generate {model} --classes 0 --output {tmp_path}/out.png": 3,
        f"generate {model} --cfg 1 --output {tmp_path}/out.png": "a class",
    }
    for command, asked in cases.items():
        line = refused(*command.split(" ", 1))
        assert f"{asked} needs the embedding of no class" in line and "--cfg 1" in line, command
    assert not sampler.calls and not (tmp_path / "run").exists() and not list(tmp_path.glob("out*"))
    run(
        "main_tokenbridge",
        f"{weights} --evaluate --no_metrics --num_images 4 --output_dir {tmp_path}/out --cfg 1",
    )


def test_everything_is_checked_before_the_first_image(
    refused, weights, quick_inception, fid_stats, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network"))
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    common = f"{weights} --evaluate --num_images 4 --output_dir {tmp_path}/out"
    assert "no FID statistics at no.npz" in refused(
        "main_tokenbridge", f"{common} --fid_stats no.npz"
    )
    assert "no Inception weights" in refused(
        "main_tokenbridge", f"{common} --fid_stats {fid_stats[0]}"
    )
    missing = f"--fid_stats {fid_stats[0]} {quick_inception.flag} --reference {tmp_path}/nowhere"
    assert "nowhere" in refused("main_tokenbridge", f"{common} {missing}")
    assert not (tmp_path / "out").exists()
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    assert "sigma contains NaN" in refused(
        "main_tokenbridge", f"{common} --fid_stats {tmp_path}/nan.npz"
    )
    online = common.replace("--evaluate", "--online_eval").replace(
        f"--resume {tmp_path}/weights", ""
    )
    online = f"{online} --data_path {tmp_path} --fid_stats {tmp_path}/nan.npz"
    write_images(tmp_path)
    assert "sigma contains NaN" in refused("main_tokenbridge", online)  # before the first step


def test_a_model_of_imagenet_256_needs_its_statistics(refused, weights, vae_path, tmp_path):
    sizes = {
        "img_size": 256,
        "vae_stride": 4,
        "vae_embed_dim": 8,
        "class_num": 1000,
        "buffer_size": 4,
    }
    model = filled(tokenbridge_tiny(**sizes, quant_levels=8))
    path = tmp_path / "weights" / "checkpoint-last.pth"
    config = {**model.config, "model": "tokenbridge_tiny", "latent_factor": 0.5}
    torch.save({"model": model.state_dict(), "config": config}, path)
    flags = f"--vae_path {vae_path} --resume {path} --evaluate --no_ema --num_images 1000 --output_dir {tmp_path}/out"
    assert "no FID statistics at fid_stats/adm_in256_stats.npz" in refused(
        "main_tokenbridge", flags
    )


def test_another_model_is_not_compared_with_imagenet(
    run, weights, tmp_path, sampler, decoder, quick_inception, fid_stats, monkeypatch, caplog
):
    monkeypatch.setattr(
        "util.metrics.compute.fid_statistics_to_metric", lambda *_, **__: {FID: 7.0}
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fid_stats").mkdir()
    shutil.copy(fid_stats[0], tmp_path / "fid_stats" / "adm_in256_stats.npz")
    common = f"{weights} --evaluate --num_images 4 {quick_inception.flag} --num_workers 0"
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/out")
    figures = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (
        IS in figures
        and FID not in figures
        and "FID is not measured: name a reference" in caplog.text
    )
    run(
        "main_tokenbridge",
        f"{common} --output_dir {tmp_path}/named --fid_stats fid_stats/adm_in256_stats.npz",
    )
    assert json.loads((tmp_path / "named" / "samples.json").read_text())[FID] == 7.0


def test_another_tokenizer_than_the_checkpoints_is_refused(
    refused, run, trained, vae_path, tmp_path
):
    content = torch.load(vae_path, weights_only=True)
    content["config"]["latent_factor"] = 0.6
    torch.save(content, tmp_path / "other.ckpt")
    command = f"{TINY} --evaluate --no_metrics --resume {trained} --vae_path {tmp_path}/other.ckpt --num_images 4"
    assert "latent_factor is 0.5 in the checkpoint, 0.6 in this run" in refused(
        "main_tokenbridge", command
    )


def test_evaluation_never_takes_an_older_checkpoint_for_the_newest(refused, train, vae_path):
    folder = train("run", "--epochs 2 --save_last_freq 1")
    (folder / "checkpoint-last.pth").write_bytes(b"damaged")
    measure = (
        f"{BASE} --evaluate --no_metrics --num_images 4 --resume {folder} --output_dir {folder}"
    )
    assert "checkpoint-last.pth" in refused("main_tokenbridge", f"{measure} --vae_path {vae_path}")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_no_rank_waits_for_the_last_chunks(ranks):
    chunks = chunks_of(50_000, 256)
    assert [number for chunk in chunks for number in chunk] == [*range(50_000)]
    assert max(map(len, chunks)) <= 256
    turns = [chunks[i : i + ranks] for i in range(0, len(chunks), ranks)]
    busiest = sum(max(map(len, turn)) for turn in turns)
    assert busiest < 1.01 * 50_000 / ranks


def test_few_chunks_are_full():
    assert [*map(len, chunks_of(120, 50))] == [50, 50, 20]
    assert [*map(len, chunks_of(50, 50))] == [50]
