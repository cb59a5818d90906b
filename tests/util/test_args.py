"""What all command lines share: flags that do not exist are refused with the one that was meant."""

import pytest


@pytest.mark.parametrize(
    ("script", "command", "line"),
    [
        ("main_tokenbridge", "--bach_size 4", "unknown flag --bach_size; did you mean --batch_size?"),
        ("main_tokenbridge", "--batch 4", "unknown flag --batch; did you mean --batch_size?"),
        ("main_vae", "-epochs=4", "unknown flag -epochs; did you mean --epochs?"),
        ("main_metrics", "--xyzzy", "unknown flag --xyzzy; --help lists the flags"),
        ("main_cache", "--seed 4 5", "5 belongs to no flag; --help lists them"),
        ("reconstruction", "--bits six", "argument --bits: invalid int value: 'six'"),
        ("tools.figures", "levels --quant_bit 4", "unknown flag --quant_bit; did you mean --quant_bits?"),
        ("tools.checkpoint", "show x.pth --tensor", "unknown flag --tensor; did you mean --tensors?"),
    ],
)
def test_wrong_flags_are_one_line_that_tells_the_right_one(refused, script, command, line):
    assert refused(script, command) == f"error: {line}"


def test_a_process_that_is_not_the_main_one_says_so(run, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run("main_cache", "--seeds 4")
    assert capsys.readouterr().err == "[process 3] error: unknown flag --seeds; did you mean --seed?\n"
