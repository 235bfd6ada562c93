"""The discriminative networks: which one, how it begins, what it returns, in which precision."""

import pytest
import torch
from torch import Tensor, nn

from cil.models.backbones import Classifier, Features, backbone_name, build_backbone

PARAMETERS = {("resnet18", 32): 11_168_832, ("resnet18", 96): 11_176_512}  # torchvision's less fc


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [(8, "cnn"), (16, "cnn"), (17, "resnet18"), (64, "resnet18"), (256, "resnet18")],
)
def test_auto_chooses_by_size_and_a_name_holds(image_size, expected):
    assert backbone_name("auto", image_size) == expected
    assert backbone_name("resnet50", image_size) == "resnet50"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "image_size", "features"),
    [
        ("cnn", 16, 64),
        ("cnn", 32, 64),
        ("resnet18", 32, 512),
        ("resnet18", 96, 512),
        ("resnet50", 17, 2048),
    ],
)
def test_an_image_becomes_a_vector_of_features(name, image_size, features, channels):
    backbone, size = build_backbone(name, channels, image_size)
    assert size == features
    outputs = backbone.eval()(torch.rand(2, channels, image_size, image_size))
    assert outputs.shape == (2, features)
    if channels == 3 and (name, image_size) in PARAMETERS:
        count = sum(parameter.numel() for parameter in backbone.parameters())
        assert count == PARAMETERS[name, image_size]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("image_size", "halvings"), [(17, 0), (64, 0), (65, 2), (256, 2)])
def test_a_resnet_keeps_the_size_of_small_images_in_its_stem(name, channels, image_size, halvings):
    backbone, _ = build_backbone(name, channels, image_size)
    images = torch.rand(1, channels, 64, 64)
    assert backbone.maxpool(backbone.conv1(images)).shape[2:] == (64 >> halvings, 64 >> halvings)
    assert backbone.conv1.kernel_size == ((3, 3) if halvings == 0 else (7, 7))
    expected = (2 / (64 * backbone.conv1.weight[0, 0].numel())) ** 0.5  # He's, by outputs
    assert backbone.conv1.weight.std().item() == pytest.approx(expected, rel=0.15)


def dtypes(model: Classifier, images: Tensor) -> dict[str, torch.dtype]:
    """What the backbone's last convolution returns, what the head is given, what it returns."""
    seen = {}
    last = [layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.register_forward_hook(lambda _, __, output: seen.update(convolution=output.dtype))
    model.head.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0].dtype))
    seen["logits"] = model(images).dtype
    return seen


@pytest.mark.parametrize("bf16", [True, False])
def test_the_backbone_alone_computes_in_16_bits(bf16):
    backbone, features = build_backbone("resnet18", 3, 32)
    model = Classifier(Features(backbone, bf16), nn.Linear(features, 5)).train()
    images = torch.rand(2, 3, 32, 32)
    full = torch.float32
    half = torch.bfloat16 if bf16 else full
    assert dtypes(model, images) == {"convolution": half, "features": full, "logits": full}
    model(images).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {full}
    if not bf16:
        model.eval()
        assert torch.equal(model(images), model.head(backbone(images)))
