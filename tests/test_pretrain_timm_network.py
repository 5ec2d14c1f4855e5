"""Networks of timm behind the interface of our Vision Transformer."""

from __future__ import annotations

import pytest
import torch

from infra.errors import UserError
from pretrain.models.config import TimmNetworkConfig
from pretrain.models.execution import Execution
from pretrain.models.timm_network import TimmNetwork

SOME = ["test_convnext", "test_efficientnet", "test_vit", "resnet10t", "test_nfnet"]
LARGE = ["mixer_s32_224", "swin_tiny_patch4_window7_224", "mvitv2_tiny", "coatnet_0_rw_224", "levit_128s"]


@pytest.mark.parametrize(("name", "side"), [*((name, 64) for name in SOME), *((name, 224) for name in LARGE)])
def test_networks_of_timm_say_what_timm_makes_of_them(name: str, side: int) -> None:
    torch.manual_seed(0)
    network = TimmNetwork(TimmNetworkConfig(name=name, image_size=side)).eval()
    images = torch.randn(2, 3, side, side)
    (features,) = network([images])
    with torch.inference_mode():
        torch.testing.assert_close(features.class_token, network.network(images))
    assert features.class_token.shape == (2, network.embed_dim)
    assert features.patch_tokens.shape == (2, (side // network.patch_size) ** 2, network.patch_dim)
    with pytest.raises(ValueError, match="no mask token"):
        network([images], [torch.zeros(2, 4, dtype=torch.bool)])


def test_networks_of_one_size_get_their_crops_resized() -> None:
    fixed, free = (
        TimmNetwork(TimmNetworkConfig(name=name, image_size=224)) for name in ("mixer_s32_224", "test_resnet")
    )
    assert (fixed.any_size, free.any_size) == (False, True)
    assert fixed.pad_to_patches(torch.zeros(1, 3, 96, 96)).shape[-1] == 224
    assert free.pad_to_patches(torch.zeros(1, 3, 96, 96)).shape[-1] == 96
    with pytest.raises(UserError, match=r"nothing-like-it: .*timm\.list_models"):
        TimmNetwork(TimmNetworkConfig(name="nothing-like-it"))


def test_networks_of_timm_drop_nothing_and_count_a_batch_once() -> None:
    """Swin has stochastic depth by itself; computed again, batch normalization would see a batch twice."""
    torch.manual_seed(0)
    swin = TimmNetwork(TimmNetworkConfig(name="swin_tiny_patch4_window7_224", image_size=64)).train()
    images = torch.randn(2, 3, 64, 64)
    first, second = (swin([images])[0].class_token for _ in range(2))
    assert torch.equal(first, second)
    plain, again = (TimmNetwork(TimmNetworkConfig(name="test_resnet", image_size=64)).train() for _ in range(2))
    again.load_state_dict(plain.state_dict())
    again.execution = Execution("full")
    for network in (plain, again):
        network([images])[0].class_token.sum().backward()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    vit = TimmNetwork(TimmNetworkConfig(name="test_vit", image_size=64))
    assert vit([torch.randn(1, 3, 40, 40)])[0].patch_tokens.shape[1] == 4  # of crops of 32 pixels
