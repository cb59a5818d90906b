"""The backbone: what reaches its features."""

import pytest
import torch

from models.tokenbridge import TokenBridge
from tests.conftest import SMALL


def test_masked_tokens_do_not_reach_the_features(small_model):
    tokens = torch.randn(2, 16, 16)
    mask = torch.zeros(2, 16)
    mask[:, 5:] = 1
    classes = small_model.class_emb(torch.tensor([0, 1]))

    def features(x):
        return small_model.forward_mae_decoder(
            small_model.forward_mae_encoder(x, mask, classes), mask
        )

    changed = tokens.clone()
    changed[:, 5:] += 1
    assert torch.equal(features(tokens), features(changed))
    changed[:, 4] += 1
    assert not torch.allclose(features(tokens), features(changed), atol=1e-3)


def test_labels_are_dropped_in_training_only(small_model):
    tokens, mask = torch.randn(400, 16, 16), torch.ones(400, 16)
    classes = small_model.class_emb(torch.zeros(400, dtype=torch.long))
    fake = small_model.forward_mae_encoder(tokens[:1], mask[:1], small_model.backbone.fake_latent)
    real = small_model.forward_mae_encoder(tokens[:1], mask[:1], classes[:1])
    model = TokenBridge(**SMALL, label_drop_prob=0.25, attn_dropout=0.0, proj_dropout=0.0)
    model.load_state_dict(small_model.state_dict())
    with torch.no_grad():
        encoded = model.train().forward_mae_encoder(tokens, mask, classes)
        dropped = (encoded - fake).flatten(1).abs().amax(1) < 1e-4
        kept = (encoded - real).flatten(1).abs().amax(1) < 1e-4
    assert (dropped ^ kept).all() and dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.allclose(model.eval().forward_mae_encoder(tokens, mask, classes), real, atol=1e-4)
