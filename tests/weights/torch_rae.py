"""RAE's decoder in plain torch, from the paper's facts: the tests' reference.

Keys are those of the published file, layers are plain functions over a dict.
"""

import math

import pytest

torch = pytest.importorskip('torch')
F = torch.nn.functional


class Draw:
  """Random tensors by name; no bias, norm or token is trivial."""

  def __init__(self, seed):
    self.g = torch.Generator().manual_seed(seed)
    self.state = {}

  def new(self, name, *shape, scale=1.0, around=0.0):
    value = around + scale * torch.randn(*shape, generator=self.g)
    self.state[name] = value

  def dense(self, name, fan_out, fan_in):
    self.new(f'{name}.weight', fan_out, fan_in, scale=fan_in**-0.5)
    self.new(f'{name}.bias', fan_out, scale=0.3)

  def norm(self, name, width):
    self.new(f'{name}.weight', width, scale=0.3, around=1.0)
    self.new(f'{name}.bias', width, scale=0.3)


def sincos(width: int, side: int) -> torch.Tensor:
  """f32[1 1+side*side width]: cls row zero; column half, then row half."""
  frequency = 10000 ** -(torch.arange(width // 4).double() / (width // 4))
  angles = torch.arange(side).double()[:, None] * frequency
  waves = torch.cat([angles.sin(), angles.cos()], -1).float()
  columns = waves.expand(side, side, -1)
  table = torch.cat([columns, columns.transpose(0, 1)], -1).flatten(0, 1)
  return torch.cat([torch.zeros(1, width), table])[None]


def state_dict(
  width=32, depth=2, mlp=48, patch=4, side=4, latent=24, seed=0
) -> dict[str, torch.Tensor]:
  """Random weights around the fixed positions."""
  d = Draw(seed)
  d.state['decoder_pos_embed'] = sincos(width, side)
  d.new('trainable_cls_token', 1, 1, width)
  d.dense('decoder_embed', width, latent)
  for i in range(depth):
    at = f'decoder_layers.{i}'
    for part in ('query', 'key', 'value'):
      d.dense(f'{at}.attention.attention.{part}', width, width)
    d.dense(f'{at}.attention.output.dense', width, width)
    d.dense(f'{at}.intermediate.dense', mlp, width)
    d.dense(f'{at}.output.dense', width, mlp)
    d.norm(f'{at}.layernorm_before', width)
    d.norm(f'{at}.layernorm_after', width)
  d.norm('decoder_norm', width)
  d.dense('decoder_pred', patch * patch * 3, width)
  return d.state


def dense(w, name, x):
  return F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])


def norm(w, name, x, eps):
  return F.layer_norm(
    x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps
  )


def decode(
  w: dict[str, torch.Tensor], z: torch.Tensor, heads: int, mean, std
) -> torch.Tensor:
  """Latents [b n c] of a square grid -> pixels [b h w 3], not clipped; in the
  type of `w` and `z`."""

  def split(name, x):
    return dense(w, name, x).unflatten(-1, (heads, -1)).transpose(1, 2)

  x = dense(w, 'decoder_embed', z)
  b, n, _ = x.shape
  x = torch.cat([w['trainable_cls_token'].expand(b, -1, -1), x], 1)
  x = x + w['decoder_pos_embed']
  depth = 1 + max(
    int(k.split('.')[1]) for k in w if k.startswith('decoder_layers')
  )
  for i in range(depth):
    at = f'decoder_layers.{i}'
    y = norm(w, f'{at}.layernorm_before', x, 1e-12)
    names = (f'{at}.attention.attention.{p}' for p in ('query', 'key', 'value'))
    y = F.scaled_dot_product_attention(*(split(name, y) for name in names))
    y = y.transpose(1, 2).flatten(2)
    x = x + dense(w, f'{at}.attention.output.dense', y)
    y = norm(w, f'{at}.layernorm_after', x, 1e-12)
    y = F.gelu(dense(w, f'{at}.intermediate.dense', y))
    x = x + dense(w, f'{at}.output.dense', y)
  x = dense(w, 'decoder_pred', norm(w, 'decoder_norm', x, 1e-12))[:, 1:]
  side, patch = math.isqrt(n), math.isqrt(x.shape[-1] // 3)
  # Token (row, column), in it pixels (row, column, channel).
  x = x.reshape(b, side, side, patch, patch, 3)
  x = torch.stack(
    [torch.cat([torch.cat(list(line), 1) for line in image], 0) for image in x]
  )
  return x * x.new_tensor(std) + x.new_tensor(mean)
