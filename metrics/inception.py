"""The networks of Table 1: FID's Inception-v3, its parts named as torchvision's, and DINOv2."""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU; padded to keep the size unless it strides."""

    def __init__(self, width, out, kernel=1, stride=1, padding="same"):
        super().__init__()

        # The strided layers of this network are not padded: 299 pixels become 149.
        padding = padding if stride == 1 else 0

        # The shift of the normalisation stands for the bias; eps is TensorFlow's.
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Convolutions {name: arguments of Conv}; a subclass says how they are wired."""

    def __init__(self, **convolutions):
        super().__init__()

        # The file of weights is loaded by these names, so they must not change.
        for name, arguments in convolutions.items():
            self.add_module(name, Conv(*arguments))


def average(x):
    """Average 3 x 3 pixels. As in TensorFlow, the padding does not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(Block):
    """(B, width, 35, 35) -> (B, 224 + pooled, 35, 35)."""

    def __init__(self, width, pooled):
        super().__init__(
            branch1x1=(width, 64),
            branch5x5_1=(width, 48), branch5x5_2=(48, 64, 5),
            branch3x3dbl_1=(width, 64), branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3),
            branch_pool=(width, pooled))

    def forward(self, x):
        once = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))

        # The next block's weights expect the branches in just this order.
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockB(Block):
    """(B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__(
            branch3x3=(288, 384, 3, 2),
            branch3x3dbl_1=(288, 64), branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3, 2))

    def forward(self, x):
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))

        # Pooling keeps its 288 channels: 384 + 96 + 288 = 768.
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, 2)], 1)


class BlockC(Block):
    """(B, 768, 17, 17) -> the same: 7 x 7 as 1 x 7 and 7 x 1, `c` channels between."""

    def __init__(self, c):
        # A row of 7 and a column of 7 see 7 x 7 pixels with 14 weights instead of 49.
        across, down = (1, 7), (7, 1)
        super().__init__(
            branch1x1=(768, 192),
            branch7x7_1=(768, c), branch7x7_2=(c, c, across), branch7x7_3=(c, 192, down),
            branch7x7dbl_1=(768, c), branch7x7dbl_2=(c, c, down), branch7x7dbl_3=(c, c, across),
            branch7x7dbl_4=(c, c, down), branch7x7dbl_5=(c, 192, across),
            branch_pool=(768, 192))

    def forward(self, x):
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockD(Block):
    """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__(
            branch3x3_1=(768, 192), branch3x3_2=(192, 320, 3, 2),
            branch7x7x3_1=(768, 192), branch7x7x3_2=(192, 192, (1, 7)),
            branch7x7x3_3=(192, 192, (7, 1)), branch7x7x3_4=(192, 192, 3, 2))

    def forward(self, x):
        once = self.branch3x3_2(self.branch3x3_1(x))
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))

        # Pooling keeps its 768 channels: 320 + 192 + 768 = 1280.
        return torch.cat([once, self.branch7x7x3_4(long), F.max_pool2d(x, 3, 2)], 1)


class BlockE(Block):
    """(B, width, 8, 8) -> (B, 2048, 8, 8): two branches fork into 1 x 3 beside 3 x 1."""

    def __init__(self, width, pool):
        super().__init__(
            branch1x1=(width, 320),
            branch3x3_1=(width, 384),
            branch3x3_2a=(384, 384, (1, 3)), branch3x3_2b=(384, 384, (3, 1)),
            branch3x3dbl_1=(width, 448), branch3x3dbl_2=(448, 384, 3),
            branch3x3dbl_3a=(384, 384, (1, 3)), branch3x3dbl_3b=(384, 384, (3, 1)),
            branch_pool=(width, 192))

        # The two blocks of this kind pool in different ways, see Inception.
        self.pool = pool

    def forward(self, x):
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))

        # The halves of a fork stand side by side: 320 + 4 x 384 + 192 = 2048 channels.
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
                          self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),
                          self.branch_pool(self.pool(x))], 1)


def resize_tf1(x, size=299):
    """Resize (B, C, H, W) to size x size as TensorFlow 1 did, because FID was defined with it.

    Bilinear: pixel i is taken at i x scale, with no shift by half a pixel and no
    antialias.
    """
    # Bilinear means linear in one direction after the other.
    for dim in (2, 3):
        length = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)

        # At the border there may be no next pixel, and then the last one counts twice.
        low = source.long()
        high = (low + 1).clamp(max=length - 1)

        # The weights vary along `dim` and are broadcast over the rest of (B, C, H, W).
        weight = (source - low).view([-1, 1] if dim == 2 else [-1])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


class Inception(nn.Sequential):
    """FID's Inception-v3: images (B, 3, H, W), values 0..255 -> features (B, 2048).

    `weights` is the file pt_inception-2015-12-05-6726825d.pth, or torch-fidelity's.
    Without it they are random until `load_state_dict`, which passes over the
    classifier's. Raises whatever another file gives, ValueError for torchvision's.
    """

    def __init__(self, weights=None):
        super().__init__()                                             # (B, 3, 299, 299)

        # nn.Sequential runs its parts in the order in which they are set here.
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)                             # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.maxpool2 = nn.MaxPool2d(3, 2)                             # (B, 192, 35, 35)

        self.Mixed_5b = BlockA(192, pooled=32)
        self.Mixed_5c = BlockA(256, pooled=64)
        self.Mixed_5d = BlockA(288, pooled=64)                         # (B, 288, 35, 35)

        self.Mixed_6a = BlockB()
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)                                    # (B, 768, 17, 17)

        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, average)
        # The maximum is a slip in the graph of 2015 that every FID since has kept.
        self.Mixed_7c = BlockE(2048, nn.MaxPool2d(3, 1, 1))            # (B, 2048, 8, 8)

        self.eval().requires_grad_(False)
        if weights is not None:
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def load_state_dict(self, state, strict=True):
        # torchvision's network has the same names, other weights and 1,000 classes.
        classifier = state["fc.weight"]
        if "AuxLogits.fc.weight" in state or classifier.shape != (1008, 2048):
            raise ValueError("torchvision's inception_v3")
        if not all(x.isfinite().all() for x in state.values()):
            raise ValueError("some numbers are not finite")
        # The features are taken before the classifier, so its weights have no place here.
        kept = {name: x for name, x in state.items() if not name.startswith("fc.")}
        return super().load_state_dict(kept, strict)

    # TF32 would move the third digit.
    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images):
        # As in the original graph: 0 becomes -1, and 255 becomes 0.992.
        x = (resize_tf1(images.float()) - 128) / 128                   # (B, 3, 299, 299)
        return super().forward(x).mean((2, 3))


def inception_file(given):
    """Return the path of FID's weights: `given`, or downloaded once. Raises UserError."""
    if given:
        return given
    url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
    try:
        torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True)
    except OSError:
        raise UserError(f"{url}: out of reach, give the file with --inception") from None
    return os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION)


def resize_dino_positions(dino, size=224):
    """Give DINOv2 the positions that torch.hub's `dinov2_vitl14` has at `size` x `size` pixels.

    Its 37 x 37 trained positions become 16 x 16, bicubic and without antialias, with the
    scale (16 + 0.1) / 37 of the original code; transformers takes 16 / 37.
    """
    positions = dino.embeddings.position_embeddings.data               # (1, 1 + 37 * 37, D)
    side = math.isqrt(positions.shape[1] - 1)
    patches = size // dino.config.patch_size
    if side != patches:
        grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = (patches + 0.1) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2)                         # (1, 16 * 16, D)
        dino.embeddings.position_embeddings.data = torch.cat([positions[:, :1], grid], 1)
