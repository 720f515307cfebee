import pytest
import timm
import torch

from backbones.cspnet import ALIASES, VARIANTS, create_model
from backbones.errors import InputError
from backbones.profile import profile, table

SEEDS = {"cspresnet50": "cspresnet50", "cspresnext50": "cspresnext50", "cspdarknet50": "cspdarknet53"}
PARAMETERS = {"cspresnet50": 21_616_168, "cspresnext50": 20_569_896, "cspdarknet50": 27_642_184}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights and running statistics such that every layer matters; timm zeroes the last BatchNorm of a block."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("size", [(224, 224), (250, 190)])
@torch.inference_mode()
def test_logits_equal_timm(name, size):
    reference = randomize(timm.create_model(SEEDS[name]))
    model = create_model(name).eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, *size)
    expected = reference(x)
    spread = expected.max() - expected.min()
    assert (model(x) - expected).abs().max() < 1e-5 * spread


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    assert sum(parameter.numel() for parameter in create_model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "size", "gmacs"),
    [
        ("cspresnet50", 224, 3.48),
        ("cspresnext50", 224, 3.11),
        ("cspdarknet50", 224, 5.04),
        ("cspresnet50", 256, 4.54),
        ("cspresnext50", 256, 4.05),
        ("cspdarknet50", 256, 6.57),
    ],
)
def test_published_gmacs(name, size, gmacs):
    assert profile(name, size).gmacs == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_features_have_the_stated_channels_and_strides(name):
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 96)
    features = model.forward_features(x)
    assert list(features) == list(model.channels) == list(model.strides) == ["c2", "c3", "c4", "c5"]
    for level, feature in features.items():
        stride = model.strides[level]
        assert feature.shape == (1, model.channels[level], 64 // stride, 96 // stride)
    # One class gives both: the logits are the head on the last map.
    torch.testing.assert_close(model(x), model.head(features["c5"]))
    assert model(x).shape == (1, 3)


def test_without_classes_the_head_gives_features():
    assert create_model("cspresnet10", num_classes=0).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize("name", ["cspresnet10", "cspresnext10", "cspdarknet10"])
def test_gradients_reach_every_parameter(name):
    model = create_model(name, num_classes=2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_alias_and_unknown_name():
    assert create_model("cspdarknet53", 2).name == ALIASES["cspdarknet53"] == "cspdarknet50"
    with pytest.raises(InputError, match="unknown model 'cspresnet5': did you mean 'cspresnet50'?"):
        create_model("cspresnet5")


def test_table_names_every_model_and_published_figure():
    text = table()
    for name, variant in VARIANTS.items():
        assert f"\n{name} " in text
        for published in variant.published:
            assert f"{published.top1:.3f}" in text
            assert f"{published.by}: {published.preprocess}" in text
