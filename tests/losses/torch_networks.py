"""VGG16 and LPIPS in plain torch, transformers' ConvNeXt, published names.

VGG16 is written from the paper and torchvision's list of keys; it shares
nothing with the package. Every array is random, norms, biases and LayerScale
included, so that each of them counts.
"""

import pytest
import transformers

torch = pytest.importorskip('torch')
nn = torch.nn
F = torch.nn.functional

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (64, 128, 256, 512, 512)
SMALL = {
  'lpips': dict(widths=(4, 4, 8, 8, 8)),
  'convnext': dict(depths=(1, 2, 1, 1), widths=(4, 8, 12, 16), classes=5),
}


def normalised(images, mean, std):
  mean, std = (images.new_tensor(x)[:, None, None] for x in (mean, std))
  return (images - mean) / std


class VGG16(nn.Module):
  """`features` numbered as published; a classifier that is only there."""

  def __init__(self, widths=WIDTHS):
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


def heads(widths=WIDTHS):
  def head(width):
    conv = nn.Conv2d(width, 1, 1, bias=False)
    return nn.ModuleDict({'model': nn.Sequential(nn.Dropout(), conv)})

  return nn.ModuleDict({f'lin{n}': head(w) for n, w in enumerate(widths)})


def lpips(vgg, heads, a, b):
  """f[b] of images [b 3 h w] in [0, 1]."""
  a, b = (vgg(normalised(2 * x - 1, SHIFT, SCALE)) for x in (a, b))
  total = 0
  for head, left, right in zip(heads.children(), a, b, strict=True):
    square = (F.normalize(left) - F.normalize(right)).square()
    total = total + head.model(square).mean((1, 2, 3))
  return total


def convnext_small(
  depths=(3, 3, 27, 3), widths=(96, 192, 384, 768), classes=1000
):
  config = transformers.ConvNextConfig(
    depths=depths, hidden_sizes=widths, num_labels=classes, layer_norm_eps=1e-6
  )
  return transformers.ConvNextForImageClassification(config)


def renamed(state, names):
  """A state dict whose keys have `names` replaced, one after the other."""
  out = {}
  for key, value in state.items():
    for theirs, published in names.items():
      key = key.replace(theirs, published)
    out[key] = value
  return out


def torchvisions(net):
  """The state dict of transformers' ConvNeXt as torchvision has it."""
  names = {
    'classifier.': 'classifier.2.',
    'convnext.layernorm.': 'classifier.0.',
    'convnext.embeddings.patch_embeddings': 'features.0.0',
    'convnext.embeddings.layernorm': 'features.0.1',
    'dwconv': 'block.0',
    'layernorm': 'block.2',
    'pwconv1': 'block.3',
    'pwconv2': 'block.5',
    'layer_scale_parameter': 'layer_scale',
  }
  for n in range(4):
    stage = f'convnext.encoder.stages.{n}'
    names[f'{stage}.downsampling_layer'] = f'features.{2 * n}'
    names[f'{stage}.layers'] = f'features.{2 * n + 1}'
  state = renamed(net.state_dict(), names)
  for key in state:
    if key.endswith('layer_scale'):
      state[key] = state[key][:, None, None]
  return state


def convnext(net, a, b):
  """f[] of images [b 3 h w] in [0, 1]."""

  def logits(x):
    x = F.interpolate(x, size=224, mode='bilinear', antialias=True)
    return net(normalised(x, MEAN, STD)).logits

  return F.mse_loss(logits(a), logits(b))


def made(term, **sizes):
  """{row of `hub.FILES`: a random network}."""
  if term == 'convnext':
    return {'convnext-small': randomised(convnext_small(**sizes))}
  nets = {'vgg16': VGG16(**sizes), 'lpips-vgg': heads(**sizes)}
  return {row: randomised(net) for row, net in nets.items()}


def states(nets):
  """{row: its state dict under the published names}."""
  return {
    row: torchvisions(net) if row == 'convnext-small' else net.state_dict()
    for row, net in nets.items()
  }


def saved(folder, states):
  """{row: the file of its state dict}."""
  files = {row: folder / f'{row}.pth' for row in states}
  for row, path in files.items():
    torch.save(states[row], path)
  return files


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
