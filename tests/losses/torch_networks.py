"""VGG16, LPIPS and ConvNeXt in plain torch, under torchvision's names.

Written for these tests from the papers and the published lists of keys; they
share nothing with the package. Every array is random, norms, biases and
LayerScale included, so that each of them counts.
"""

import pytest

torch = pytest.importorskip('torch')
nn = torch.nn
F = torch.nn.functional

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _channels(values):
  return torch.tensor(values, dtype=torch.double)[None, :, None, None]


class VGG16(nn.Module):
  """`features` numbered as published; a classifier that is only there."""

  def __init__(self, widths=(64, 128, 256, 512, 512)):
    super().__init__()
    layers, channels = [], 3
    for group, width in enumerate(widths):
      for _ in range(3 if group > 1 else 2):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
      layers.append(nn.MaxPool2d(2))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout())

  def forward(self, x):
    taps = []
    for n, layer in enumerate(self.features[:30]):
      x = layer(x)
      if n in (3, 8, 15, 22, 29):
        taps.append(x)
    return taps


class Head(nn.Module):
  def __init__(self, width):
    super().__init__()
    conv = nn.Conv2d(width, 1, 1, bias=False)
    self.model = nn.Sequential(nn.Dropout(), conv)


class Heads(nn.Module):
  def __init__(self, widths=(64, 128, 256, 512, 512)):
    super().__init__()
    for n, width in enumerate(widths):
      self.add_module(f'lin{n}', Head(width))


def lpips(vgg, heads, a, b):
  """f[b] of images [b 3 h w] in [0, 1], the eps beside the root."""

  def unit(x):
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

  total = 0
  sides = [
    vgg((2 * x - 1 - _channels(SHIFT)) / _channels(SCALE)) for x in (a, b)
  ]
  for n, (left, right) in enumerate(zip(*sides, strict=True)):
    weight = getattr(heads, f'lin{n}').model[1].weight
    square = (unit(left) - unit(right)).square()
    total = total + F.conv2d(square, weight).mean((1, 2, 3))
  return total


class Norm2d(nn.LayerNorm):
  """LayerNorm over the channels of [b c h w]."""

  def forward(self, x):
    return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Move(nn.Module):
  def __init__(self, source, destination):
    super().__init__()
    self.ends = source, destination

  def forward(self, x):
    return x.movedim(*self.ends)


class Block(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))
    self.block = nn.Sequential(
      nn.Conv2d(width, width, 7, padding=3, groups=width),
      Move(1, -1),
      nn.LayerNorm(width, 1e-6),
      nn.Linear(width, 4 * width),
      nn.GELU(),
      nn.Linear(4 * width, width),
      Move(-1, 1),
    )

  def forward(self, x):
    return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
  def __init__(
    self, depths=(3, 3, 27, 3), widths=(96, 192, 384, 768), classes=1000
  ):
    super().__init__()
    layers = []
    for level, (depth, width) in enumerate(zip(depths, widths, strict=True)):
      if level:
        before = widths[level - 1]
        down = nn.Conv2d(before, width, 2, 2)
        layers.append(nn.Sequential(Norm2d(before, 1e-6), down))
      else:
        down = nn.Conv2d(3, width, 4, 4)
        layers.append(nn.Sequential(down, Norm2d(width, 1e-6)))
      layers.append(nn.Sequential(*(Block(width) for _ in range(depth))))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(
      Norm2d(widths[-1], 1e-6),
      nn.Flatten(),
      nn.Linear(widths[-1], classes),
    )

  def forward(self, x):
    return self.classifier(self.features(x).mean((2, 3), keepdim=True))


def convnext(net, a, b):
  """f[] of images [b 3 h w] in [0, 1]."""

  def logits(x):
    x = F.interpolate(
      x, size=224, mode='bilinear', align_corners=False, antialias=True
    )
    return net((x - _channels(MEAN)) / _channels(STD))

  return F.mse_loss(logits(a), logits(b))


@torch.no_grad()
def randomised(module, seed=0):
  """Kernels that keep a signal's size, and everything else off its default."""
  made = torch.Generator().manual_seed(seed)
  for name, value in module.named_parameters():
    noise = torch.randn(value.shape, generator=made)
    if name.startswith('lin'):
      value.copy_(noise.abs() * 0.3)
    elif 'layer_scale' in name:
      value.copy_(0.3 + 0.1 * noise)
    elif value.ndim > 1:
      value.copy_(noise * (2 / value[0].numel()) ** 0.5)
    elif name.endswith('weight'):
      value.copy_(1 + 0.2 * noise)
    else:
      value.copy_(0.1 * noise)
  return module.eval().requires_grad_(False)
