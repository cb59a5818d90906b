"""A new head is a class and an entry of HEADS: it trains, samples and is measured by command."""

import inspect
import json

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import main_tokenbridge
from models.channel_head import Head
from models.heads import HEADS, option_owners
from models.sampling import SamplingOptions, TokenOptions
from models.tokenbridge import SIZES, TokenBridge, sizes_of
from tests.conftest import SHORT, TINY, batch, load, variant
from util.options import option_names


class LinearHead(Head):
    """Independent channels, from one linear layer."""

    sizes = {"tokenbridge_tiny": {"channel_depth": 7}}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.decoder_embed_dim, self.channel_steps * self.classes)

    def logits(self, features: Tensor) -> Tensor:
        return self.linear(features).unflatten(1, (self.channel_steps, self.classes))

    def summed_loss(self, features: Tensor, given: Tensor) -> Tensor:
        logits = self.logits(features).flatten(0, 1).float()
        return F.cross_entropy(logits, given.flatten(), reduction="sum")

    def draw(self, features: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, classes = self.logits(features).float().log_softmax(dim=-1).max(dim=-1)
        return self.to_levels(classes)[:, self.from_generation_order], log_probs.sum(dim=1)

    def training_flops(self) -> float:
        return 2 * self.linear.weight.numel()

    def elements_per_token(self) -> int:
        return self.channel_steps * self.classes


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setitem(HEADS, "linear", LinearHead)


def test_a_new_head_works_in_a_model(linear):
    model = variant(head="linear").train()
    model(*batch(model)).backward()
    assert model.head.linear.weight.grad.any() and model.training_flops() > 0
    latents = model.sample_tokens(2, 3, labels=[0, 1], seeds=[1, 2])
    assert latents.shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match="--first_place only applies to --head ar"):
        model.sample_tokens(2, 3, first_place="released")


def test_a_new_head_works_by_command(linear, run, cached, vae_path, tmp_path):
    out = f"{tmp_path}/run"
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} --output_dir {out}"
    run("main_tokenbridge", f"{train} --head linear --epochs 1")
    run("main_tokenbridge", f"{train} --epochs 2 --resume {out}")
    config = load(tmp_path / "run")["config"]
    assert (config["head"], config["channel_depth"]) == ("linear", 7)
    evaluate = f"{TINY} --resume {out} --output_dir {out} --vae_path {vae_path}"
    run("main_tokenbridge", f"{evaluate} --evaluate --num_images 4 --num_iter 2 --no_metrics")
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4
    run("main_tokenbridge", f"{evaluate} --evaluate_nll --use_cached --cached_val_path {cached}")
    assert json.loads((tmp_path / "run" / "likelihood.json").read_text())["nats_per_dim"] > 0


def test_options_of_all_heads_are_sampling_options():
    own = [name for head in HEADS.values() for name in head.option_names()]
    assert option_names(SamplingOptions) == option_names(TokenOptions) + list(dict.fromkeys(own))
    assert option_owners() == {
        "first_place": ["ar"],
        "head_steps": ["masked"],
        "head_order": ["masked"],
    }


def test_calls_and_commands_have_the_releases_numbers_of_steps():
    parameters = inspect.signature(TokenBridge.sample_tokens).parameters
    assert parameters["num_iter"].default == SamplingOptions().num_iter == 64
    assert main_tokenbridge.get_args_parser().parse_args([]).num_iter == 256


def test_sizes_follow_the_head():
    large = SIZES["tokenbridge_large"]
    assert sizes_of("tokenbridge_large", "ar") == sizes_of("tokenbridge_large", "parallel") == large
    assert sizes_of("tokenbridge_large", "masked") == {**large, "channel_depth": 6}
    for unknown in ("diffusion", None, ["ar"]):  # what a damaged checkpoint may hold
        assert sizes_of("tokenbridge_large", unknown) == large
