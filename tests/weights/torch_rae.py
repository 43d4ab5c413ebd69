"""RAE's decoder in plain torch, from the paper's facts: the tests' reference.

Keys are those of the published file.
"""

import collections

import pytest

from tests.encoders.references import randomise

torch = pytest.importorskip('torch')
nn, F = torch.nn, torch.nn.functional

WIDTH, MLP, HEADS, PATCH, SIDE = 32, 48, 4, 4, 4


def sincos() -> torch.Tensor:
  """f32[1 1+side*side width]: cls row zero; column half, then row half."""
  frequency = 10000 ** -(torch.arange(WIDTH // 4).double() / (WIDTH // 4))
  angles = torch.arange(SIDE).double()[:, None] * frequency
  waves = torch.cat([angles.sin(), angles.cos()], -1).float()
  columns = waves.expand(SIDE, SIDE, -1)
  table = torch.cat([columns, columns.transpose(0, 1)], -1).flatten(0, 1)
  return torch.cat([torch.zeros(1, WIDTH), table])[None]


def dense(fan_in, fan_out):
  linear = nn.Linear(fan_in, fan_out)
  return nn.Sequential(collections.OrderedDict(dense=linear))


class Layer(nn.Module):
  def __init__(self):
    super().__init__()
    self.layernorm_before = nn.LayerNorm(WIDTH, 1e-12)
    self.layernorm_after = nn.LayerNorm(WIDTH, 1e-12)
    parts = {p: nn.Linear(WIDTH, WIDTH) for p in ('query', 'key', 'value')}
    self.attention = nn.ModuleDict(
      dict(attention=nn.ModuleDict(parts), output=dense(WIDTH, WIDTH))
    )
    self.intermediate, self.output = dense(WIDTH, MLP), dense(MLP, WIDTH)

  def forward(self, x):
    y = self.layernorm_before(x)
    parts = [part(y) for part in self.attention.attention.values()]
    heads = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
    y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    x = x + self.attention.output(y)
    return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Decoder(nn.Module):
  def __init__(self, latent):
    super().__init__()
    self.register_buffer('decoder_pos_embed', sincos())
    self.trainable_cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
    self.decoder_embed = nn.Linear(latent, WIDTH)
    self.decoder_layers = nn.Sequential(Layer(), Layer())
    self.decoder_norm = nn.LayerNorm(WIDTH, 1e-12)
    self.decoder_pred = nn.Linear(WIDTH, PATCH * PATCH * 3)

  def forward(self, z):
    """Latents [b n c] -> normalized pixels [b h w 3], not clipped."""
    cls = self.trainable_cls_token.expand(len(z), -1, -1)
    x = torch.cat([cls, self.decoder_embed(z)], 1) + self.decoder_pos_embed
    x = self.decoder_pred(self.decoder_norm(self.decoder_layers(x)))[:, 1:]
    # Token (row, column), in it pixels (row, column, channel).
    x = x.reshape(-1, SIDE, SIDE, PATCH, PATCH, 3).transpose(2, 3)
    return x.reshape(-1, SIDE * PATCH, SIDE * PATCH, 3)


def state_dict(latent=24) -> dict[str, torch.Tensor]:
  """Random weights around the fixed positions."""
  return randomise(Decoder(latent)).state_dict()
