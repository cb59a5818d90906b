"""What all command lines share: wrong flags are refused with the one that was meant; ``--config`` reads flags."""

import pytest

import main_tokenbridge
from tools import figures


@pytest.mark.parametrize(
    ("script", "command", "line"),
    [
        (
            "main_tokenbridge",
            "--bach_size 4",
            "unknown flag --bach_size; did you mean --batch_size?",
        ),
        ("main_tokenbridge", "--batch 4", "unknown flag --batch; did you mean --batch_size?"),
        ("main_vae", "-epochs=4", "unknown flag -epochs; did you mean --epochs?"),
        ("main_metrics", "--xyzzy", "unknown flag --xyzzy; --help lists the flags"),
        ("main_cache", "--seed 4 5", "5 belongs to no flag; --help lists them"),
        ("reconstruction", "--bits six", "argument --bits: invalid int value: 'six'"),
        (
            "tools.figures",
            "levels --quant_bit 4",
            "unknown flag --quant_bit; did you mean --quant_bits?",
        ),
        (
            "main_tokenbridge",
            "--use_quantized_value",
            "unknown flag --use_quantized_value; the release ignores this, tokens are always the quantized values: "
            "leave it out",
        ),
        (
            "main_cache",
            "--local_rank=3",
            "unknown flag --local_rank; torchrun decides this: leave it out",
        ),
        (
            "main_tokenbridge",
            "--log_dir out",
            "unknown flag --log_dir; logs go to --output_dir: leave it out",
        ),
        (
            "main_tokenbridge",
            "--diffloss_d 3",
            "unknown flag --diffloss_d; MAR's diffusion loss has this, TokenBridge has none: leave it out",
        ),
        (
            "tools.checkpoint",
            "show x.pth --tensor",
            "unknown flag --tensor; did you mean --tensors?",
        ),
    ],
)
def test_wrong_flags_are_one_line_that_tells_the_right_one(refused, script, command, line):
    assert refused(script, command) == f"error: {line}"


def test_a_process_that_is_not_the_main_one_says_so(run, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run("main_cache", "--seeds 4")
    assert capsys.readouterr().err == "[rank 3] error: unknown flag --seeds; did you mean --seed?\n"


def parsed(tmp_path, text: str, *typed: str) -> dict:
    """What main_tokenbridge.py takes from a file of flags, and ``typed`` ones."""
    (tmp_path / "run.yaml").write_text(text)
    args = vars(
        main_tokenbridge.get_args_parser().parse_args(["--config", f"{tmp_path}/run.yaml", *typed])
    )
    return {name: value for name, value in args.items() if name != "config"}


def test_a_file_of_flags_is_as_good_as_typing_them(tmp_path):
    text = """
    model: tokenbridge_base   # a comment
    lr: 1e-4
    quant_min: -3.5
    output_dir: 2026-01-02
    resume: no
    fid_stats:
    cfg: [1, 3.1]
    temperature: 0.9
    checkpoint_blocks:
      - encoder
      - head
    grad_checkpointing: true
    evaluate: false
    pin_mem: false
    mirror: false
    """
    typed = "--model tokenbridge_base --lr 1e-4 --quant_min -3.5 --output_dir 2026-01-02 --resume no --fid_stats= "
    typed += "--cfg 1 3.1 --temperature 0.9 --checkpoint_blocks encoder head --grad_checkpointing --no_pin_mem"
    assert parsed(tmp_path, text) == parsed(tmp_path, "{}", *typed.split(), "--no_mirror")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("no_mirror: true", "--no_mirror"),
        ("no_mirror: false", ""),
        ("no_pin_mem: true", "--no_pin_mem"),
        ("{pin_mem: false, no_pin_mem: false}", ""),
        ("no_ema: True", "--no_ema"),
        ("no_ema: false", ""),
    ],
)
def test_flags_without_a_value_are_true_or_false_by_either_name(tmp_path, text, flags):
    assert parsed(tmp_path, text) == parsed(tmp_path, "{}", *flags.split())


def test_typed_flags_win_wherever_they_stand(tmp_path):
    text = "{epochs: 3, cfg: [1, 2], pin_mem: false}"
    given = parsed(tmp_path, text, "--epochs", "5", "--pin_mem", "--cfg", "4")
    assert (given["epochs"], given["pin_mem"], given["cfg"]) == (5, True, [4.0])
    typed = ["--epochs", "5", "--config", f"{tmp_path}/run.yaml"]
    assert main_tokenbridge.get_args_parser().parse_args(typed).epochs == 5


def test_subcommands_read_files_of_their_flags(tmp_path):
    (tmp_path / "levels.yaml").write_text("quant_bits: 4")
    args = figures.get_args_parser().parse_args(
        ["levels", "--num_images", "7", "--config", f"{tmp_path}/levels.yaml"]
    )
    assert (args.figure, args.quant_bits, args.num_images) == ("levels", 4, 7)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("bach_size: 4", "FILE: unknown flag bach_size; did you mean batch_size?"),
        ("dist_url: env", "FILE: unknown flag dist_url; torchrun decides this: leave it out"),
        ("--epochs: 4", "FILE: unknown flag --epochs; did you mean epochs?"),
        ("config: other.yaml", "FILE: unknown flag config; did you mean"),
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("lr_schedule: square", "argument --lr_schedule: invalid choice: 'square' (choose from"),
        ("lr: [1, 2]", "FILE: lr takes one value, not ['1', '2']"),
        ("freeze: []", "argument --freeze: expected at least one argument"),
        ("pin_mem: 1", "FILE: pin_mem is true or false, not 1"),
        ("- epochs", "FILE must hold lines of the form 'flag: value'"),
        ("", "FILE must hold lines of the form 'flag: value'"),
        ("a: [", "FILE cannot be read as YAML: while parsing"),
        (None, "FILE cannot be read as YAML: [Errno 2] No such file"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(refused, tmp_path, text, line):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    said = refused("main_tokenbridge", f"--config {path}")
    assert said.startswith(f"error: {line}".replace("FILE", str(path)))
