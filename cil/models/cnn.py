"""The discriminative methods' backbone for images of up to about 16 pixels."""

from torch import Tensor, nn


class CNN(nn.Module):
    """Three convolutions, each with batch normalisation, then the mean over all positions.

    The first two halve the size: at full size the digits were learned no better, and slower. With
    `width` 32 and a head for ten classes it has 57,000 parameters.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.features = 2 * width
        self.layers = nn.Sequential(
            _convolution(channels, width, stride=2),
            _convolution(width, 2 * width, stride=2),
            _convolution(2 * width, 2 * width, stride=1),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images (B, channels, H, W) -> features (B, 2 * width)."""
        return self.layers(images_BCHW).mean(dim=(2, 3))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        # The normalisation has a shift of its own.
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
