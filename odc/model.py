"""The network: a ResNet that returns its five feature maps, the ODC neck, and the classifier."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

# name -> (block, blocks of each stage, channels of the stem)
ARCHS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "narrow": (BasicBlock, (1, 1, 1, 1), 16),  # ours, for small images on a CPU
}
FEATURE_DIM = 256  # d, the width of a feature (recipe)


def use_small_stem(image_size):
    """Images of at most 64 pixels keep their resolution in the stem: 3x3, stride 1, no max-pool."""
    return image_size <= 64


class ResNet(nn.Module):
    """The backbone: v1.5 (the stride is in the 3x3 convolution), torchvision's names, no `fc`.

    Convolutions start Kaiming-normal with fan_in, as in OpenSelfSup; MMSelfSup's have fan_out.
    """

    def __init__(self, arch="resnet50", small_stem=False):
        super().__init__()
        block, blocks, width = ARCHS[arch]
        self.arch, self.small_stem = arch, small_stem
        side, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, width, side, stride, padding=side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        self.out_channels = [width]
        for stage, count in enumerate(blocks):
            in_channels, planes = self.out_channels[-1], width * 2**stage
            setattr(self, f"layer{stage + 1}",
                    _stage(block, in_channels, planes, count, stride=1 if stage == 0 else 2))
            self.out_channels.append(planes * block.expansion)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images):
        """[B, 3, S, S] -> [feature1, ..., feature5]; feature1 precedes the max-pool."""
        feature1 = self.relu(self.bn1(self.conv1(images)))
        feature2 = self.layer1(self.maxpool(feature1))
        feature3 = self.layer2(feature2)
        feature4 = self.layer3(feature3)
        feature5 = self.layer4(feature4)
        return [feature1, feature2, feature3, feature4, feature5]


def _stage(block, in_channels, planes, count, stride):
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
    first = block(in_channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(count - 1)))


class Neck(nn.Module):
    """Average pool and two linear layers, the ODC neck: [B, in_channels, h, w] -> [B, dim].

    plain (ours): without the dropout and the last ReLU.
    """

    def __init__(self, in_channels, hidden=512, dim=FEATURE_DIM, plain=False):
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden)
        self.bn1 = nn.BatchNorm1d(hidden, momentum=0.001, affine=False)
        self.dropout = nn.Dropout(0.0 if plain else 0.5)
        self.fc2 = nn.Linear(hidden, dim)
        self.last = nn.Identity() if plain else nn.ReLU()
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(fc.bias)

    def forward(self, feature5):
        x = feature5.mean(dim=(2, 3))
        x = self.dropout(torch.relu(self.bn1(self.fc1(x))))
        return self.last(self.fc2(x))


class CentredPool(nn.Module):
    """What is clustered instead of the neck: unit length less the mean of all images (ours)."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, feature5):
        return F.normalize(feature5.mean(dim=(2, 3))) - self.mean


class ODC(nn.Module):
    """Backbone, neck and head. The head classifies into the K clusters of the moment."""

    def __init__(self, arch="resnet50", small_stem=False, dim=FEATURE_DIM, num_clusters=10000,
                 plain_neck=False):
        super().__init__()
        self.backbone = ResNet(arch, small_stem)
        self.neck = Neck(self.backbone.out_channels[-1], dim=dim, plain=plain_neck)
        self.head = nn.Linear(dim, num_clusters)
        self.reset_head()

    def reset_head(self):
        """Forget the clusters: weights N(0, 0.01) and bias 0, as the recipe starts."""
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """[B, 3, S, S] -> features z [B, d] before normalisation, logits [B, K]."""
        z = self.neck(self.backbone(images)[-1])
        return z, self.head(z)
