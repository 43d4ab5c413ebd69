"""The discriminators in plain torch, in f64: the tests' references.

DINO is a function over a dict with the published names; heads and PatchGAN
are modules, spectral norm is torch's own.
"""

import math

import pytest

torch = pytest.importorskip('torch')
F = torch.nn.functional
spectral_norm = torch.nn.utils.spectral_norm


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchGAN(torch.nn.Module):
  """[b 3 h w] in [-1, 1] -> [b n]."""

  def __init__(self, hidden, halvings, groups, pool):
    super().__init__()
    self.conv_in = torch.nn.Conv2d(3, hidden, 5, padding=2)
    self.convs, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
    width = hidden
    for i in range(halvings):
      self.convs.append(torch.nn.Conv2d(width, hidden * 2**i, 3, padding=1))
      width = hidden * 2**i
      self.norms.append(torch.nn.GroupNorm(groups, width))
    self.pool = torch.nn.AdaptiveMaxPool2d((pool, pool))
    self.conv_mix = torch.nn.Conv2d(width, width, 1)
    self.conv_out = torch.nn.Conv2d(width, 1, 5, padding=2)
    for parameter in self.norms.parameters():
      torch.nn.init.normal_(parameter, 1.0, 0.3)
    self.double()

  def blur(self, x):
    """A 4 x 4 binomial, stride 2, padded so that n becomes ceil(n / 2)."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = torch.outer(row, row) / 64
    pads = []
    for n in (x.shape[3], x.shape[2]):
      total = 2 if n % 2 == 0 else 3
      pads += [1, total - 1]
    c = x.shape[1]
    return F.conv2d(
      F.pad(x, pads), kernel.expand(c, 1, 4, 4), stride=2, groups=c
    )

  def forward(self, x):
    x = F.leaky_relu(self.conv_in(x), 0.1)
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = F.leaky_relu(norm(self.blur(conv(x))), 0.1)
    x = F.leaky_relu(self.conv_mix(self.pool(x)), 0.1)
    return self.conv_out(x).flatten(1)

  def leaves(self):
    """{leaf name of ours: array}."""
    convs = {'conv_in': self.conv_in, 'conv_mix': self.conv_mix}
    convs['conv_out'] = self.conv_out
    convs |= {f'conv{i}': conv for i, conv in enumerate(self.convs)}
    out = {}
    for name, conv in convs.items():
      out[f'{name}/kernel'] = conv.weight.permute(2, 3, 1, 0)
      out[f'{name}/bias'] = conv.bias
    for i, norm in enumerate(self.norms):
      out |= {f'norm{i}/scale': norm.weight, f'norm{i}/bias': norm.bias}
    return arrays(out)


def arrays(tensors):
  return {
    name: t.detach().float().numpy().copy() for name, t in tensors.items()
  }


def dino_file(width, depth, mlp, patch, side, seed=0):
  """Random tensors under the names of the published file, f32."""
  g = torch.Generator().manual_seed(seed)

  def draw(*shape, scale=0.3, around=0.0):
    return around + scale * torch.randn(*shape, generator=g)

  out = {
    'cls_token': draw(1, 1, width),
    'pos_embed': draw(1, 1 + side * side, width),
    'patch_embed.proj.weight': draw(width, 3, patch, patch, scale=0.5 / patch),
    'patch_embed.proj.bias': draw(width),
  }

  def dense(name, fan_out, fan_in):
    out[f'{name}.weight'] = draw(fan_out, fan_in, scale=fan_in**-0.5)
    out[f'{name}.bias'] = draw(fan_out)

  def norm(name):
    out[f'{name}.weight'] = draw(width, around=1.0)
    out[f'{name}.bias'] = draw(width)

  for i in range(depth):
    at = f'blocks.{i}'
    norm(f'{at}.norm1')
    dense(f'{at}.attn.qkv', 3 * width, width)
    dense(f'{at}.attn.proj', width, width)
    norm(f'{at}.norm2')
    dense(f'{at}.mlp.fc1', mlp, width)
    dense(f'{at}.mlp.fc2', width, mlp)
  norm('norm')
  return out


def dino_taps(state, images, heads, taps):
  """[b 3 h w] in [0, 1] -> a list of [b c n], one a tap."""
  state = {name: value.to(images.dtype) for name, value in state.items()}
  kernel = state['patch_embed.proj.weight']
  width, patch = kernel.shape[0], kernel.shape[-1]
  side = patch * math.isqrt(state['pos_embed'].shape[1] - 1)
  x = F.interpolate(images, (side, side), mode='bilinear', align_corners=False)
  mean, std = (
    torch.tensor(v, dtype=images.dtype)[:, None, None] for v in (MEAN, STD)
  )
  x = F.conv2d(
    (x - mean) / std, kernel, state['patch_embed.proj.bias'], stride=patch
  )
  x = x.flatten(2).transpose(1, 2)
  cls = state['cls_token'].expand(len(x), 1, width)
  x = torch.cat([cls, x], 1) + state['pos_embed']

  def dense(name, y):
    return F.linear(y, state[f'{name}.weight'], state[f'{name}.bias'])

  def norm(name, y):
    scale, bias = state[f'{name}.weight'], state[f'{name}.bias']
    return F.layer_norm(y, (width,), scale, bias, 1e-6)

  def split(y):
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)

  found = []
  while f'blocks.{len(found)}.norm1.weight' in state:
    at = f'blocks.{len(found)}'
    bias = state[f'{at}.attn.qkv.bias'].clone()
    bias[width : 2 * width] = 0
    y = F.linear(norm(f'{at}.norm1', x), state[f'{at}.attn.qkv.weight'], bias)
    q, k, v = map(split, y.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + dense(f'{at}.attn.proj', y)
    y = dense(f'{at}.mlp.fc1', norm(f'{at}.norm2', x))
    x = x + dense(f'{at}.mlp.fc2', F.gelu(y, approximate='tanh'))
    found.append(x[:, 1:].transpose(1, 2))
  return [found[t] for t in taps]


class Head(torch.nn.Module):
  """[b c n] -> [b n]."""

  def __init__(self, width, kernel):
    super().__init__()

    def conv(out, k):
      return spectral_norm(
        torch.nn.Conv1d(width, out, k, padding=k // 2, padding_mode='circular'),
        eps=1e-12,
      )

    def norm():
      made = torch.nn.InstanceNorm1d(width, 1e-6, affine=True)
      torch.nn.init.normal_(made.weight, 1.0, 0.3)
      torch.nn.init.normal_(made.bias, 0.0, 0.3)
      return made

    self.enter, self.mix = conv(width, 1), conv(width, kernel)
    self.out = conv(1, 1)
    self.enter_norm, self.mix_norm = norm(), norm()
    self.double()

  def forward(self, x):
    x = F.leaky_relu(self.enter_norm(self.enter(x)), 0.2)
    y = F.leaky_relu(self.mix_norm(self.mix(x)), 0.2)
    return self.out((x + y) / math.sqrt(2)).squeeze(1)


class DinoDiscriminator(torch.nn.Module):
  """[b 3 h w] in [0, 1] -> [b n], over a file of `dino_file`."""

  def __init__(self, state, heads, taps, kernel):
    super().__init__()
    self.state, self.num_heads, self.taps = state, heads, taps
    width = state['cls_token'].shape[-1]
    self.heads = torch.nn.ModuleList(Head(width, kernel) for _ in taps)

  def forward(self, images):
    taps = dino_taps(self.state, images, self.num_heads, self.taps)
    pairs = zip(self.heads, taps, strict=True)
    return torch.cat([head(tap) for head, tap in pairs], 1)

  def leaves(self):
    """({leaf name: kernels and biases}, {leaf name: vectors}), ours."""
    params, spectral = {}, {}
    for i, head in enumerate(self.heads):
      for name in ('enter', 'mix', 'out'):
        conv, at = getattr(head, name), f'head{i}/{name}'
        c, k = conv.weight_orig.shape[1:]
        params[f'{at}/kernel'] = conv.weight_orig.permute(2, 1, 0)
        params[f'{at}/bias'] = conv.bias
        spectral[f'{at}/u'] = conv.weight_u
        spectral[f'{at}/v'] = conv.weight_v.reshape(c, k).T.reshape(c * k)
      for name in ('enter_norm', 'mix_norm'):
        norm = getattr(head, name)
        params[f'head{i}/{name}/scale'] = norm.weight
        params[f'head{i}/{name}/bias'] = norm.bias
    return arrays(params), arrays(spectral)
