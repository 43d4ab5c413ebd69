"""The PyTorch project's quantizers and models in plain torch.

The tests' reference: its keys and arithmetic. The encoder is one of
transformers (`tests/encoders/references.py`). Weights are random; no bias,
norm, cls token or gain is trivial.
"""

import math

import pytest

from tests.encoders.references import randomise
from tests.weights.torch_rae import SIDE, WIDTH, Decoder

torch = pytest.importorskip('torch')
nn, F = torch.nn, torch.nn.functional

LEVELS = (7, 5, 3)  # even ones are none of its linear form
CODES = 48
FORMS = (
  'vq', 'vq-gradient', 'vq-conv', 'simvq-l2', 'simvq-cosine', 'simvq-mapped',
  'fsq', 'fsq-latent-conv', 'fsq-code-conv', 'fsq-mlp-fourier',
)  # fmt: skip
COSINE = 'simvq-cosine', 'simvq-mapped'
GELU = nn.GELU()


class ToCodes(nn.Module):
  """An MLP from latents to the values that FSQ rounds."""

  def __init__(self):
    super().__init__()
    self.norm = nn.LayerNorm(WIDTH)
    first, last = nn.Linear(WIDTH, 512), nn.Linear(512, len(LEVELS))
    self.net = nn.Sequential(first, GELU, nn.Linear(512, 512), GELU, last)
    self.register_buffer('post_gain', torch.tensor([3.0, 2.0, 4.0]))

  def forward(self, z):
    return torch.tanh(self.net(self.norm(z))) * self.post_gain


class ToLatents(nn.Module):
  """Fourier features of FSQ's codes, and an MLP over them."""

  def __init__(self):
    super().__init__()
    self.fourier = nn.Module()
    noise = torch.Generator().manual_seed(0)
    frequencies = 10 * torch.randn(len(LEVELS), 128, generator=noise)
    self.fourier.register_buffer('B', frequencies)
    first, middle, last = (nn.Linear(n, WIDTH) for n in (256, WIDTH, WIDTH))
    norm1, norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    self.mlp = nn.Sequential(first, norm1, GELU, middle, norm2, GELU, last)

  def forward(self, codes):
    turns = 2 * math.pi * codes @ self.fourier.B
    return self.mlp(torch.cat([turns.sin(), turns.cos()], -1))


class Model(nn.Module):
  """A full model but for its encoder."""

  def __init__(self, form):
    super().__init__()
    self.form, self.decoder = form, Decoder(WIDTH)
    self.quantizer = q = nn.Module()
    if form in ('vq', 'vq-conv'):
      q.embedding = q.ema_w = nn.Parameter(torch.empty(CODES, WIDTH))
      q.register_buffer('ema_cluster_size', torch.ones(CODES))
    elif form.startswith('fsq'):
      axes = [torch.arange(n) - (n - 1) / 2 for n in LEVELS]
      q.register_buffer('codebook', torch.cartesian_prod(*axes))
      q.register_buffer('basis', torch.tensor([15, 3, 1]))
      self.fsq_projection = nn.Linear(WIDTH, len(LEVELS))
      self.fsq_unprojection = nn.Linear(len(LEVELS), WIDTH)
    else:
      q.embedding = nn.Embedding(CODES, WIDTH)
    if form == 'fsq-mlp-fourier':
      q.register_buffer('scales', q.codebook.amax(0))
      self.fsq_projection, self.fsq_unprojection = ToCodes(), ToLatents()
    if form.startswith('simvq'):
      q.embedding_proj = nn.Linear(WIDTH, WIDTH)
      q.register_buffer('ema_cluster_size', torch.zeros(CODES))
    if form in COSINE:
      q.register_buffer('l2_norm_scale', torch.tensor(10.0))
    if form == 'simvq-mapped':
      q.z_proj = nn.Linear(WIDTH, WIDTH)
    self.post_quant_conv = nn.Identity()
    if form.endswith('conv'):
      # On FSQ's codes the project's default, one token wide.
      c, k = (len(LEVELS), 1) if form == 'fsq-code-conv' else (WIDTH, 3)
      self.post_quant_conv = nn.Conv2d(c, c, k, padding=k // 2)

  def quantize(self, z):
    """Latents [b n d] -> (z_q, indices [b n])."""
    q, form = self.quantizer, self.form
    if form.startswith('fsq'):
      return self.quantize_fsq(z)
    table = q.embedding if form in ('vq', 'vq-conv') else q.embedding.weight
    if form.startswith('simvq'):
      table = q.embedding_proj(table)
    if form == 'simvq-mapped':
      z = q.z_proj(z)
    unit, scores = F.normalize(table, dim=-1), -torch.cdist(z, table[None])
    if form in COSINE:
      scores = F.normalize(z, dim=-1) @ unit.T
    indices = scores.argmax(-1)
    codes = unit if form == 'simvq-mapped' else table
    return self.convolve(codes[indices]), indices

  def quantize_fsq(self, z):
    x, half = self.fsq_projection(z), self.quantizer.codebook.amax(0)
    if self.form == 'fsq-mlp-fourier':
      digits = torch.minimum((x * half + half).round().clamp(min=0), 2 * half)
    else:
      digits = torch.maximum(torch.minimum(x.round(), half), -half) + half
    indices = (digits.long() * self.quantizer.basis).sum(-1)
    if self.form == 'fsq-code-conv':
      return self.fsq_unprojection(self.convolve(digits - half)), indices
    return self.convolve(self.fsq_unprojection(digits - half)), indices

  def convolve(self, x):
    grid = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return self.post_quant_conv(grid).flatten(2).transpose(1, 2)


def state_dict(form, encoder):
  """A full model around an encoder's {key: tensor}."""
  return encoder | randomise(Model(form)).state_dict()


def loaded(state, form):
  model = Model(form)
  assert not model.load_state_dict(state, strict=False).missing_keys
  return model


def quantize(state, z, form):
  """Latents [b n d] -> (z_q, indices [b n])."""
  return loaded(state, form).quantize(z)


def decode(state, z_q, mean, std):
  """z_q [b n d] -> the reconstruction f32[b h w 3]."""
  x = loaded(state, 'vq').decoder(z_q).detach()
  return (x * torch.tensor(std) + torch.tensor(mean)).numpy()
