"""The discriminative methods' networks: a backbone by name, and a classifier on its features."""

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50

from cil.models.cnn import CNN

_RESNETS = {"resnet18": resnet18, "resnet50": resnet50}
_LARGEST_FOR_CNN = 16  # pixels
_LARGEST_FOR_SMALL_STEM = 64  # pixels
SMALLEST_FOR_RESNET = 16  # pixels: its last features would be one position, of the padding mostly


def backbone_name(wanted: str, image_size: int) -> str:
    """`wanted`, or where that is auto what suits the size: cnn up to 16 px, resnet18 above."""
    if wanted != "auto":
        return wanted
    return "cnn" if image_size <= _LARGEST_FOR_CNN else "resnet18"


def build_backbone(name: str, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A network (B, channels, H, W) -> (B, features), untrained, and its number of features.

    cnn, resnet18 or resnet50. The ResNets are torchvision's (arXiv 1512.03385). Up to 64 px they
    begin with a 3x3 convolution of stride 1 and no pooling, as the class-incremental literature has
    it on CIFAR and on Tiny ImageNet (Mammoth, arXiv 2004.07211, at 64 px too).
    """
    if name == "cnn":
        cnn = CNN(channels)
        return cnn, cnn.features
    resnet = _RESNETS[name](weights=None)
    if image_size <= _LARGEST_FOR_SMALL_STEM:
        _replace_stem(resnet, nn.Conv2d(channels, 64, 3, padding=1, bias=False))
        resnet.maxpool = nn.Identity()
    elif channels != 3:
        _replace_stem(resnet, nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False))
    features = resnet.fc.in_features
    resnet.fc = nn.Identity()
    return resnet, features


def _replace_stem(resnet: ResNet, stem: nn.Conv2d) -> None:
    # Drawn as torchvision draws the other convolutions.
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    resnet.conv1 = stem


class Passes:
    """Counts the images that went through a network, for what its learning cost.

    Copies of the network count in the same place: some methods ask an old one as well.
    """

    def __init__(self) -> None:
        self.learned = 0  # forward and backward
        self.read = 0  # forward alone

    def __deepcopy__(self, _: object) -> "Passes":
        return self

    def forwards(self) -> int:
        """In forward passes; a backward pass takes two of them."""
        return 3 * self.learned + self.read


class Features(nn.Module):
    """A backbone that computes in bfloat16 where `bf16` says so; weights and features have 32 bits.

    The precision is decided within, because Avalanche's training loop enters no autocast of its
    own.
    """

    def __init__(self, network: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.network = network
        self.bf16 = bf16
        self.passes = Passes()

    def train(self, mode: bool = True) -> "Features":
        """Once frozen it stays in evaluation mode: its normalisation would learn on."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images (B, channels, H, W) -> features (B, D), float32."""
        if images_BCHW.is_cuda:  # the order of values that its convolutions are fastest in
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=self.bf16):
            features_BD = self.network(images_BCHW)
        if features_BD.requires_grad:
            self.passes.learned += len(images_BCHW)
        else:
            self.passes.read += len(images_BCHW)
        return features_BD.float()


class Classifier(nn.Module):
    """A head on a backbone's features."""

    def __init__(self, backbone: Features, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images (B, channels, H, W) -> logits (B, classes), float32."""
        return self.head(self.backbone(images_BCHW))
