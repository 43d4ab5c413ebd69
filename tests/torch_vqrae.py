"""The PyTorch project's quantizers and models in plain torch.

The tests' reference: its keys and arithmetic, as functions over a dict. The
encoder is one of transformers (`tests/encoders/references.py`). Weights are
random; no bias, norm, cls token or gain is trivial.
"""

import math

import pytest

from tests.weights import torch_rae
from tests.weights.torch_rae import Draw, dense, norm

torch = pytest.importorskip('torch')
F = torch.nn.functional

WIDTH, DEPTH, MLP, HEADS, PATCH, SIDE = 32, 2, 48, 4, 4, 4
LEVELS = (8, 5, 4)
CODES = 48
FORMS = (
  'vq', 'vq-gradient', 'vq-conv', 'simvq-l2', 'simvq-cosine', 'simvq-mapped',
  'fsq', 'fsq-clip', 'fsq-latent-conv', 'fsq-code-conv', 'fsq-mlp-fourier',
)  # fmt: skip


def quantizer_state(d, form):
  q = 'quantizer'
  if form in ('vq', 'vq-conv'):
    d.new(f'{q}.embedding', CODES, WIDTH)
    d.state[f'{q}.ema_cluster_size'] = torch.ones(CODES)
    d.state[f'{q}.ema_w'] = d.state[f'{q}.embedding'].clone()
  elif form == 'vq-gradient':
    d.new(f'{q}.embedding.weight', CODES, WIDTH)
  elif form.startswith('simvq'):
    d.new(f'{q}.embedding.weight', CODES, WIDTH, scale=WIDTH**-0.5)
    d.dense(f'{q}.embedding_proj', WIDTH, WIDTH)
    d.state[f'{q}.ema_cluster_size'] = torch.zeros(CODES)
    if form != 'simvq-l2':
      d.state[f'{q}.l2_norm_scale'] = torch.tensor(10.0)
    if form == 'simvq-mapped':
      d.dense(f'{q}.z_proj', WIDTH, WIDTH)
  else:
    fsq_state(d, form)
  if form.endswith('conv'):
    # On FSQ's codes the project's default, one token wide.
    c, k = (len(LEVELS), 1) if form == 'fsq-code-conv' else (WIDTH, 3)
    d.new('post_quant_conv.weight', c, c, k, k, scale=0.3 / k)
    d.new('post_quant_conv.bias', c, scale=0.3)


def fsq_state(d, form):
  axes = [torch.arange(n).float() - (n - 1) / 2 for n in LEVELS]
  grid = torch.meshgrid(*axes, indexing='ij')
  d.state['quantizer.codebook'] = torch.stack([g.flatten() for g in grid], -1)
  d.state['quantizer.basis'] = torch.tensor([20, 4, 1])
  c = len(LEVELS)
  if form != 'fsq-mlp-fourier':
    d.dense('fsq_projection', c, WIDTH)
    d.dense('fsq_unprojection', WIDTH, c)
    return
  d.state['quantizer.scales'] = torch.tensor([(n - 1) / 2 for n in LEVELS])
  d.norm('fsq_projection.norm', WIDTH)
  for i, (o, n) in enumerate(((512, WIDTH), (512, 512), (c, 512))):
    d.dense(f'fsq_projection.net.{2 * i}', o, n)
  d.new('fsq_projection.post_gain', c, scale=0.3, around=1.0)
  d.new('fsq_unprojection.fourier.B', c, 128, scale=10.0)
  for i, n in enumerate((256, WIDTH, WIDTH)):
    d.dense(f'fsq_unprojection.mlp.{3 * i}', WIDTH, n)
    if i < 2:
      d.norm(f'fsq_unprojection.mlp.{3 * i + 1}', WIDTH)


def state_dict(form, encoder, seed=0):
  """A full model around an encoder's {key: tensor}."""
  d = Draw(seed)
  quantizer_state(d, form)
  decoder = torch_rae.state_dict(
    WIDTH, DEPTH, MLP, PATCH, SIDE, latent=WIDTH, seed=seed + 1
  )
  return encoder | d.state | {f'decoder.{k}': v for k, v in decoder.items()}


def quantize(w, z, form):
  """Latents [b n d] -> (z_q, indices [b n])."""
  if form.startswith('fsq'):
    return quantize_fsq(w, z, form)
  if form.startswith('vq'):
    key = 'quantizer.embedding'
    table = w[key] if key in w else w[f'{key}.weight']
    indices = torch.cdist(z, table[None]).argmin(-1)
    return convolve(w, table[indices], form), indices
  table = dense(w, 'quantizer.embedding_proj', w['quantizer.embedding.weight'])
  if form == 'simvq-mapped':
    z = dense(w, 'quantizer.z_proj', z)
  if form == 'simvq-l2':
    indices = torch.cdist(z, table[None]).argmin(-1)
    return table[indices], indices
  unit = F.normalize(table, dim=-1)
  indices = (F.normalize(z, dim=-1) @ unit.T).argmax(-1)
  return (unit if form == 'simvq-mapped' else table)[indices], indices


def quantize_fsq(w, z, form):
  half = torch.tensor([(n - 1) / 2 for n in LEVELS])
  if form == 'fsq-mlp-fourier':
    x = norm(w, 'fsq_projection.norm', z, 1e-5)
    for i in range(3):
      x = dense(w, f'fsq_projection.net.{2 * i}', F.gelu(x) if i else x)
    x = torch.tanh(x) * w['fsq_projection.post_gain'] * half
  elif form == 'fsq-clip':
    x = dense(w, 'fsq_projection', z)
  else:
    x = torch.tanh(dense(w, 'fsq_projection', z)) * half
  digits = torch.minimum((x + half).round().clamp(min=0), 2 * half)
  codes = digits - half
  indices = (digits.long() * w['quantizer.basis']).sum(-1)
  if form == 'fsq-code-conv':
    codes = convolve(w, codes, form)
    return dense(w, 'fsq_unprojection', codes), indices
  if form != 'fsq-mlp-fourier':
    return convolve(w, dense(w, 'fsq_unprojection', codes), form), indices
  turns = 2 * math.pi * codes @ w['fsq_unprojection.fourier.B']
  x = torch.cat([turns.sin(), turns.cos()], -1)
  for i in range(3):
    at = 'fsq_unprojection.mlp'
    if i:
      x = F.gelu(norm(w, f'{at}.{3 * i - 2}', x, 1e-5))
    x = dense(w, f'{at}.{3 * i}', x)
  return x, indices


def convolve(w, x, form):
  if not form.endswith('conv'):
    return x
  grid = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
  kernel, bias = (w[f'post_quant_conv.{n}'] for n in ('weight', 'bias'))
  out = F.conv2d(grid, kernel, bias, padding=kernel.shape[-1] // 2)
  return out.flatten(2).transpose(1, 2)


def decode(w, z_q, mean, std):
  """z_q [b n d] -> the reconstruction f32[b h w 3]."""
  at = 'decoder.'
  decoder = {k.removeprefix(at): v for k, v in w.items() if k.startswith(at)}
  return torch_rae.decode(decoder, z_q, HEADS, mean, std).numpy()
