"""transformers' encoders with random weights: what ours are held to.

Every parameter is drawn anew, biases, norms and LayerScale too: as they are
initialised, a bias in the wrong place changes nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import transformers as t

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Kind:
  """A family: how its model is built, called, and where its final norm is."""

  build: Callable
  norm: str
  pixels: dict
  prefix: int
  call: Callable


def _interpolated(model, x, patch):
  return model(x, interpolate_pos_encoding=True)


def _resampled(model, x, patch):
  return model(x)  # always, where the grid is another


def _mae(model, x, patch):
  """Without masks, and in the image's own order."""
  n = (x.shape[2] // patch) * (x.shape[3] // patch)
  noise = torch.arange(n, dtype=torch.float32).expand(x.shape[0], n)
  return model(x, noise=noise, interpolate_pos_encoding=True)


def _naflex(model, x, patch):
  b, c, h, w = x.shape
  gh, gw = h // patch, w // patch
  x = x.reshape(b, c, gh, patch, gw, patch).permute(0, 2, 4, 3, 5, 1)
  x = x.reshape(b, gh * gw, patch * patch * c)
  mask = torch.ones(b, gh * gw, dtype=torch.int32)
  return model(x, mask, torch.tensor([[gh, gw]] * b))


def siglip(*, width, depth, heads, mlp, pixels, patch):
  return t.SiglipVisionModel(
    t.SiglipVisionConfig(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      intermediate_size=mlp,
      image_size=pixels,
      patch_size=patch,
    )
  )


def siglip2(*, width, depth, heads, mlp, pixels, patch):
  return t.Siglip2VisionModel(
    t.Siglip2VisionConfig(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      intermediate_size=mlp,
      num_patches=(pixels // patch) ** 2,
      patch_size=patch,
    )
  )


def _dinov2(registers=False, swiglu=False):
  def build(*, width, depth, heads, mlp, pixels, patch):
    del mlp  # 4 x width, or SwiGLU's share of it
    kind = 'Dinov2WithRegisters' if registers else 'Dinov2'
    config = getattr(t, f'{kind}Config')(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      image_size=pixels,
      patch_size=patch,
      use_swiglu_ffn=swiglu,
    )
    return getattr(t, f'{kind}Model')(config)

  return build


def mae(*, width, depth, heads, mlp, pixels, patch):
  return t.ViTMAEModel(
    t.ViTMAEConfig(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      intermediate_size=mlp,
      image_size=pixels,
      patch_size=patch,
      mask_ratio=0.0,
    )
  )


def _internvit(**more):
  def build(*, width, depth, heads, mlp, pixels, patch):
    return t.InternVLVisionModel(
      t.InternVLVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=[pixels, pixels],
        patch_size=[patch, patch],
        **more,
      )
    )

  return build


LARGE = dict(attention_bias=False, use_qk_norm=True, norm_type='rms_norm')
KINDS = {
  'siglip': Kind(siglip, 'post_layernorm', HALF, 0, _interpolated),
  'naflex': Kind(siglip2, 'post_layernorm', HALF, 0, _naflex),
  'dinov2': Kind(_dinov2(), 'layernorm', IMAGENET, 1, _resampled),
  'dinov2-swiglu': Kind(
    _dinov2(swiglu=True), 'layernorm', IMAGENET, 1, _resampled
  ),
  'dinov2-registers': Kind(
    _dinov2(registers=True), 'layernorm', IMAGENET, 5, _resampled
  ),
  'dinov2-registers-swiglu': Kind(
    _dinov2(True, True), 'layernorm', IMAGENET, 5, _resampled
  ),
  'mae': Kind(mae, 'layernorm', IMAGENET, 1, _mae),
  'internvit-300m': Kind(
    _internvit(attention_bias=True), 'layernorm', IMAGENET, 1, _resampled
  ),
  'internvit-6b': Kind(
    _internvit(**LARGE), 'layernorm', IMAGENET, 1, _resampled
  ),
}


def randomise(model, seed=0):
  """Draws every parameter, so that features stay of the order of one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(generator=generator)
      if name.endswith('.weight') and p.ndim > 1 and 'position' not in name:
        p.mul_(math.prod(p.shape[1:]) ** -0.5)
      elif 'lambda' in name:
        p.mul_(0.2).add_(0.5)
      elif name.endswith('.weight') and p.ndim == 1:
        p.mul_(0.3).add_(1.0)
      else:
        p.mul_(0.3)
  return model.eval()


def make(kind, seed=0, **sizes):
  return randomise(KINDS[kind].build(**sizes), seed)


def latents(kind, model, images, patch, output_norm='affine', dtype=None):
  """f32[b gh gw d] of the torch model, as `load_encoder` says it."""
  k = KINDS[kind]
  published = getattr(model, k.norm)
  if output_norm == 'plain':
    c = model.config
    plain = torch.nn.LayerNorm(
      c.hidden_size, c.layer_norm_eps, elementwise_affine=False
    )
    setattr(model, k.norm, plain)
  elif output_norm == 'none':
    setattr(model, k.norm, torch.nn.Identity())
  mean, std = (torch.tensor(k.pixels[w]) for w in ('mean', 'std'))
  x = (torch.from_numpy(np.array(images)) - mean) / std
  x = x.permute(0, 3, 1, 2)
  try:
    with torch.no_grad():
      if dtype is not None:
        model, x = model.to(dtype), x.to(dtype)
      out = k.call(model, x, patch).last_hidden_state[:, k.prefix :]
  finally:
    setattr(model, k.norm, published)
  gh, gw = images.shape[1] // patch, images.shape[2] // patch
  return out.float().numpy().reshape(len(images), gh, gw, -1)


def error(a, b):
  """‖a - b‖ / ‖b‖ over all tokens."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def original_names(model):
  """A state dict of a "-hf" InternViT under its authors' names."""
  out, state = {}, model.state_dict()
  words = {
    'embeddings.cls_token': 'embeddings.class_embedding',
    'embeddings.patch_embeddings.projection': 'embeddings.patch_embedding',
    'embeddings.position_embeddings': 'embeddings.position_embedding',
    'encoder.layer.': 'encoder.layers.',
    'attention.projection_layer': 'attn.proj',
    'attention.': 'attn.',
    'lambda_': 'ls',
    'layernorm_before': 'norm1',
    'layernorm_after': 'norm2',
  }
  for key, value in state.items():
    if '_proj.' in key:
      if '.q_proj.' not in key:
        continue
      parts = [state[key.replace('q_proj', f'{q}_proj')] for q in 'qkv']
      key, value = key.replace('q_proj', 'qkv'), torch.cat(parts)
    for theirs, ours in words.items():
      key = key.replace(theirs, ours)
    out[key] = value.contiguous()
  return out


def big_vision(model, stacked=False):
  """{key: array} of a SigLIP as big_vision's `.npz` files have it."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  heads = model.config.num_attention_heads
  top, layers = 'params/img/', model.config.num_hidden_layers
  kernel = state['embeddings.patch_embedding.weight']
  positions = state['embeddings.position_embedding.weight']
  out = {
    f'{top}embedding/kernel': kernel.transpose(2, 3, 1, 0),
    f'{top}embedding/bias': state['embeddings.patch_embedding.bias'],
    f'{top}pos_embedding': positions[None],
    f'{top}MAPHead_0/probe': np.zeros((1, 1, 4), np.float32),
    f'{top}Transformer/encoder_norm/scale': state['post_layernorm.weight'],
    f'{top}Transformer/encoder_norm/bias': state['post_layernorm.bias'],
    'params/txt/Embed_0/embedding': np.zeros((3, 4), np.float32),
    'params/t': np.zeros([1], np.float32),
    'params/b': np.zeros([1], np.float32),
  }
  blocks = []
  for i in range(layers):
    theirs, ours = f'encoder.layers.{i}.', {}
    for q in ('q', 'k', 'v', 'out'):
      w = state[f'{theirs}self_attn.{q}_proj.weight'].T
      b = state[f'{theirs}self_attn.{q}_proj.bias']
      if q == 'out':
        w = w.reshape(heads, -1, w.shape[1])
      else:
        w, b = w.reshape(len(w), heads, -1), b.reshape(heads, -1)
      name = dict(q='query', k='key', v='value').get(q, q)
      at = f'MultiHeadDotProductAttention_0/{name}'
      ours |= {f'{at}/kernel': w, f'{at}/bias': b}
    for n in (0, 1):
      mlp, norm = f'{theirs}mlp.fc{n + 1}', f'{theirs}layer_norm{n + 1}'
      ours |= {
        f'MlpBlock_0/Dense_{n}/kernel': state[f'{mlp}.weight'].T,
        f'MlpBlock_0/Dense_{n}/bias': state[f'{mlp}.bias'],
        f'LayerNorm_{n}/scale': state[f'{norm}.weight'],
        f'LayerNorm_{n}/bias': state[f'{norm}.bias'],
      }
    blocks.append(ours)
  at = f'{top}Transformer/encoderblock'
  if stacked:
    for key in blocks[0]:
      out[f'{at}/{key}'] = np.stack([block[key] for block in blocks])
  else:
    for i, block in enumerate(blocks):
      out |= {f'{at}_{i}/{key}': value for key, value in block.items()}
  return out
