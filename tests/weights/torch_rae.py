"""RAE's decoder in plain torch, from the paper's facts: the tests' reference.

Keys are those of the published file, layers are plain functions over a dict.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip('torch')
F = torch.nn.functional


def sincos(width: int, side: int) -> torch.Tensor:
  """f32[1 1+side*side width]: cls row zero; column half, then row half."""
  quarter = width // 4
  rows = []
  for r in range(side):
    for c in range(side):
      row = []
      for position in (c, r):
        angles = [position / 10000 ** (k / quarter) for k in range(quarter)]
        row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
      rows.append(row)
  table = torch.tensor([[0.0] * width, *rows], dtype=torch.float64)
  return table.float()[None]


def state_dict(
  width=32, depth=2, mlp=48, patch=4, side=4, latent=24, seed=0
) -> dict[str, torch.Tensor]:
  """Random weights; biases, norms and the cls token are not trivial."""
  g = torch.Generator().manual_seed(seed)

  def draw(*shape, scale=1.0, around=0.0):
    return around + scale * torch.randn(*shape, generator=g)

  out = {
    'decoder_pos_embed': sincos(width, side),
    'trainable_cls_token': draw(1, 1, width),
  }

  def dense(name, fan_out, fan_in):
    out[f'{name}.weight'] = draw(fan_out, fan_in, scale=fan_in**-0.5)
    out[f'{name}.bias'] = draw(fan_out, scale=0.3)

  def norm(name):
    out[f'{name}.weight'] = draw(width, scale=0.3, around=1.0)
    out[f'{name}.bias'] = draw(width, scale=0.3)

  dense('decoder_embed', width, latent)
  for i in range(depth):
    at = f'decoder_layers.{i}'
    for part in ('query', 'key', 'value'):
      dense(f'{at}.attention.attention.{part}', width, width)
    dense(f'{at}.attention.output.dense', width, width)
    dense(f'{at}.intermediate.dense', mlp, width)
    dense(f'{at}.output.dense', width, mlp)
    norm(f'{at}.layernorm_before')
    norm(f'{at}.layernorm_after')
  norm('decoder_norm')
  dense('decoder_pred', patch * patch * 3, width)
  return out


def decode(
  w: dict[str, torch.Tensor], z: np.ndarray, heads: int, mean, std
) -> np.ndarray:
  """Latents [b n c] of a square grid -> pixels [b h w 3], not clipped."""
  return painted(w, torch.from_numpy(z), heads, mean, std).numpy()


def painted(
  w: dict[str, torch.Tensor], z: torch.Tensor, heads: int, mean, std
) -> torch.Tensor:
  """`decode` of tensors, to be differentiated; in the type of `w` and `z`."""

  def dense(x, name):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

  def norm(x, name):
    mu = x.mean(-1, keepdim=True)
    var = ((x - mu) ** 2).mean(-1, keepdim=True)
    x = (x - mu) / torch.sqrt(var + 1e-12)
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

  def split(x):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

  x = dense(z, 'decoder_embed')
  b, n, _ = x.shape
  x = torch.cat([w['trainable_cls_token'].expand(b, -1, -1), x], 1)
  x = x + w['decoder_pos_embed']
  depth = 1 + max(
    int(k.split('.')[1]) for k in w if k.startswith('decoder_layers')
  )
  for i in range(depth):
    at = f'decoder_layers.{i}'
    y = norm(x, f'{at}.layernorm_before')
    q, k, v = (
      split(dense(y, f'{at}.attention.attention.{p}'))
      for p in ('query', 'key', 'value')
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    x = x + dense(y, f'{at}.attention.output.dense')
    y = F.gelu(
      dense(norm(x, f'{at}.layernorm_after'), f'{at}.intermediate.dense')
    )
    x = x + dense(y, f'{at}.output.dense')
  x = dense(norm(x, 'decoder_norm'), 'decoder_pred')[:, 1:]
  side = math.isqrt(n)
  patch = math.isqrt(x.shape[-1] // 3)
  # Token (row, column), in it pixels (row, column, channel).
  x = x.reshape(b, side, side, patch, patch, 3)
  x = torch.stack(
    [torch.cat([torch.cat(list(line), 1) for line in image], 0) for image in x]
  )
  return x * x.new_tensor(std) + x.new_tensor(mean)
