"""The discriminators in torch, in f64: the tests' references.

DINO is transformers' ViT, heads and PatchGAN are modules whose names are those
of ours, spectral norm is torch's own.
"""

import collections
import functools
import math

import pytest
import transformers

from tests.encoders.references import randomise
from tests.losses.torch_networks import MEAN, STD, normalised, renamed

torch = pytest.importorskip('torch')
F = torch.nn.functional
spectral_norm = torch.nn.utils.spectral_norm


def leaves(tensors):
  """{leaf name of ours: array} of (torch's name, tensor)."""
  out = {}
  for name, t in tensors:
    home, _, last = name.rpartition('.')
    if t.ndim > 1:
      last, t = 'kernel', t.movedim((1, 0), (-2, -1))
    last = {'weight': 'scale', 'weight_u': 'u', 'weight_v': 'v'}.get(last, last)
    leaf = f'{home}.{last}'.replace('.', '/')
    out[leaf] = t.detach().float().numpy().copy()
  return out


def draw_norms(model):
  for name, parameter in model.named_parameters():
    if 'norm' in name:
      torch.nn.init.normal_(parameter, 1.0, 0.3)


class Blur(torch.nn.Module):
  """A 4 x 4 binomial, stride 2, padded so that n becomes ceil(n / 2)."""

  def forward(self, x):
    _, c, h, w = x.shape
    row = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = torch.outer(row, row).expand(c, 1, 4, 4)
    x = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))
    return F.conv2d(x, kernel, stride=2, groups=c)


class PatchGAN(torch.nn.Sequential):
  """[b 3 h w] in [-1, 1] -> [b n]."""

  def __init__(self, hidden, halvings, groups, pool):
    nn, width = torch.nn, hidden
    layers = {'conv_in': nn.Conv2d(3, hidden, 5, padding=2)}
    layers['act_in'] = nn.LeakyReLU(0.1)
    for i in range(halvings):
      before, width = width, hidden * 2**i
      layers[f'conv{i}'] = nn.Conv2d(before, width, 3, padding=1)
      layers[f'blur{i}'] = Blur()
      layers[f'norm{i}'] = nn.GroupNorm(groups, width)
      layers[f'act{i}'] = nn.LeakyReLU(0.1)
    layers['pool'] = nn.AdaptiveMaxPool2d((pool, pool))
    layers['conv_mix'] = nn.Conv2d(width, width, 1)
    layers['act_mix'] = nn.LeakyReLU(0.1)
    layers['conv_out'] = nn.Conv2d(width, 1, 5, padding=2)
    layers['flat'] = nn.Flatten()
    super().__init__(collections.OrderedDict(layers))
    draw_norms(self)
    self.double()

  def leaves(self):
    return leaves(self.named_parameters())


def dino(spec):
  """transformers' ViT of a `ViTSpec`'s sizes, every parameter drawn."""
  config = transformers.ViTConfig(
    hidden_size=spec.width,
    num_hidden_layers=spec.depth,
    num_attention_heads=spec.num_heads,
    intermediate_size=spec.mlp_dim,
    image_size=spec.grid[0] * spec.patch_size,
    patch_size=spec.patch_size,
    hidden_act='gelu_pytorch_tanh',
    layer_norm_eps=1e-6,
  )
  return randomise(transformers.ViTModel(config, add_pooling_layer=False))


DINO_NAMES = {
  'embeddings.cls_token': 'cls_token',
  'embeddings.position_embeddings': 'pos_embed',
  'embeddings.patch_embeddings.projection': 'patch_embed.proj',
  'layers.': 'blocks.',
  'attention.q_proj': 'attn.qkv',
  'attention.o_proj': 'attn.proj',
  'layernorm_before': 'norm1',
  'layernorm_after': 'norm2',
  'layernorm': 'norm',
}


def dino_file(vit):
  """Its state dict under the published names."""
  state = vit.state_dict()
  for key in [key for key in state if 'q_proj' in key]:
    parts = [state.pop(key.replace('q_proj', f'{n}_proj')) for n in 'qkv']
    state[key] = torch.cat(parts)
  return renamed(state, DINO_NAMES)


def taps_of(vit, taps, images):
  """[b 3 h w] in [0, 1] -> a list of [b c n], one a tap."""
  x = F.interpolate(images, vit.config.image_size, mode='bilinear')
  states = vit(normalised(x, MEAN, STD), output_hidden_states=True)
  return [states.hidden_states[t + 1][:, 1:].transpose(1, 2) for t in taps]


class Head(torch.nn.Module):
  """[b c n] -> [b n]."""

  def __init__(self, width, kernel):
    super().__init__()

    def conv(out, k):
      return spectral_norm(
        torch.nn.Conv1d(width, out, k, padding=k // 2, padding_mode='circular'),
        eps=1e-12,
      )

    self.enter, self.mix, self.out = (
      conv(width, 1),
      conv(width, kernel),
      conv(1, 1),
    )
    self.enter_norm, self.mix_norm = (
      torch.nn.InstanceNorm1d(width, 1e-6, affine=True) for _ in range(2)
    )

  def forward(self, x):
    x = F.leaky_relu(self.enter_norm(self.enter(x)), 0.2)
    y = F.leaky_relu(self.mix_norm(self.mix(x)), 0.2)
    return self.out((x + y) / math.sqrt(2)).squeeze(1)


class DinoDiscriminator(torch.nn.Module):
  """[b 3 h w] in [0, 1] -> [b n], over the frozen ViT of `dino`."""

  def __init__(self, vit, taps, kernel):
    super().__init__()
    # In a partial, the ViT's parameters are not this module's.
    self.taps = functools.partial(
      taps_of, vit.double().requires_grad_(False), taps
    )
    self.width = vit.config.hidden_size
    for i in range(len(taps)):
      self.add_module(f'head{i}', Head(self.width, kernel))
    draw_norms(self)
    self.double()

  def forward(self, images):
    pairs = zip(self.children(), self.taps(images), strict=True)
    return torch.cat([head(tap) for head, tap in pairs], 1)

  def leaves(self):
    """({leaf name: kernels and biases}, {leaf name: vectors}), ours."""
    vectors = dict(self.named_buffers())
    for name, v in vectors.items():
      if name.endswith('_v'):  # torch's is of channels and then of taps
        vectors[name] = v.reshape(self.width, -1).T.ravel()
    return leaves(self.named_parameters()), leaves(vectors.items())
