"""transformers' encoders with random weights: the references of ours.

Every parameter is drawn, biases, norms and LayerScale too: at their initial
values, a bias in the wrong place changes nothing.
"""

import functools
import math
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import pytest
import transformers

from vqrae_jax import convert

torch = pytest.importorskip('torch')

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = dict(
  mean=(0.48145466, 0.4578275, 0.40821073),
  std=(0.26862954, 0.26130258, 0.27577711),
)


class Kind(NamedTuple):
  """A family: its classes, where its last norm is, its pixels."""

  classes: str
  norm: str = 'layernorm'
  pixels: dict = IMAGENET
  config: dict | None = None


SWIGLU = dict(use_swiglu_ffn=True)
REGISTERS = dict(num_register_tokens=4)
GATED = REGISTERS | dict(use_gated_mlp=True, hidden_act='silu')
NO_BIAS = dict(query_bias=False, value_bias=False)
LARGE = dict(attention_bias=False, use_qk_norm=True, norm_type='rms_norm')
KINDS = {
  'siglip': Kind('SiglipVision', 'post_layernorm', HALF),
  'naflex': Kind('Siglip2Vision', 'post_layernorm', HALF),
  'dinov2': Kind('Dinov2'),
  'dinov2-swiglu': Kind('Dinov2', config=SWIGLU),
  'dinov2-registers': Kind('Dinov2WithRegisters'),
  'dinov2-registers-swiglu': Kind('Dinov2WithRegisters', config=SWIGLU),
  'dinov3': Kind('DINOv3ViT', 'norm', config=REGISTERS),
  'dinov3-gated': Kind('DINOv3ViT', 'norm', config=GATED),
  'dinov3-7b': Kind('DINOv3ViT', 'norm', config=GATED | NO_BIAS),
  'mae': Kind('ViTMAE'),
  'internvit-300m': Kind('InternVLVision', config=dict(attention_bias=True)),
  'internvit-6b': Kind('InternVLVision', config=LARGE),
  'clip': Kind('CLIPVision', 'post_layernorm', OPENAI),
  'clip-laion': Kind(
    'CLIPVision', 'post_layernorm', OPENAI, dict(hidden_act='gelu')
  ),
}


def config(kind, *, width, depth, heads, mlp, pixels, patch):
  """transformers' config. DINOv2's mlp is 4 x width, or SwiGLU's."""
  k = KINDS[kind]
  sizes = dict(hidden_size=width, num_hidden_layers=depth, patch_size=patch)
  sizes['num_attention_heads'] = heads
  if kind == 'naflex':
    sizes['num_patches'] = (pixels // patch) ** 2
  else:
    sizes['image_size'] = pixels
  if not kind.startswith('dinov2'):
    sizes['intermediate_size'] = mlp
  sizes |= k.config or {}
  return getattr(transformers, f'{k.classes}Config')(**sizes)


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


def build(kind, **sizes):
  model = getattr(transformers, f'{KINDS[kind].classes}Model')
  return model(config(kind, **sizes))


def make(kind, seed=0, **sizes):
  return randomise(build(kind, **sizes), seed)


def sizes_of(vit) -> dict:
  """A `ViTSpec`'s sizes as `config` takes them."""
  sizes = dict(width=vit.width, depth=vit.depth, heads=vit.num_heads)
  side, p = vit.grid[0], vit.patch_size
  return sizes | dict(mlp=vit.mlp_dim, pixels=side * p, patch=p)


TINY = dict(width=32, depth=2, heads=4, mlp=48, pixels=16, patch=4)
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def model(kind):
  """A tiny model, the same for all tests."""
  return make(kind, **TINY)


@functools.cache
def saved(kind) -> pathlib.Path:
  """The folder that its `save_pretrained` wrote."""
  folder = pathlib.Path(_FOLDER.name, kind)
  model(kind).save_pretrained(folder)
  return folder


def latents(
  kind, model, images, patch, output_norm='affine', dtype=torch.float32
):
  """f32[b gh gw d] of the torch model, as our encoder gives them."""
  k, c = KINDS[kind], model.config

  def last_norm(_, args, out):
    (x,) = args
    plain = torch.nn.functional.layer_norm(
      x, x.shape[-1:], eps=c.layer_norm_eps
    )
    return dict(affine=out, plain=plain, none=x)[output_norm]

  mean, std = (torch.tensor(k.pixels[w]) for w in ('mean', 'std'))
  x = (torch.from_numpy(np.array(images)) - mean) / std
  x = x.permute(0, 3, 1, 2).to(dtype)
  gh, gw = images.shape[1] // patch, images.shape[2] // patch
  _, call = convert.REFERENCES[c.model_type]
  norm = getattr(model.to(dtype), k.norm)
  with torch.no_grad(), norm.register_forward_hook(last_norm):
    out = call(model, x, patch).last_hidden_state
  # After the prefix tokens.
  return out[:, -gh * gw :].float().numpy().reshape(len(images), gh, gw, -1)


def error(a, b):
  """‖a - b‖ / ‖b‖ over all tokens."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def original_names(model):
  """A state dict of a "-hf" InternViT under its authors' names."""
  out, state = {}, model.state_dict()
  names = {
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
    for theirs, ours in names.items():
      key = key.replace(theirs, ours)
    out[key] = value.contiguous()
  return out


def _big_vision_block(state, at, heads):
  out = {}
  for name, q in dict(query='q', key='k', value='v', out='out').items():
    w = state[f'{at}self_attn.{q}_proj.weight'].T
    b = state[f'{at}self_attn.{q}_proj.bias']
    if name == 'out':
      w = w.reshape(heads, -1, w.shape[1])
    else:
      w, b = w.reshape(len(w), heads, -1), b.reshape(heads, -1)
    ours = f'MultiHeadDotProductAttention_0/{name}'
    out |= {f'{ours}/kernel': w, f'{ours}/bias': b}
  for n in (0, 1):
    dense = f'MlpBlock_0/Dense_{n}', f'mlp.fc{n + 1}', 'kernel'
    norm = f'LayerNorm_{n}', f'layer_norm{n + 1}', 'scale'
    for ours, theirs, leaf in (dense, norm):
      out[f'{ours}/{leaf}'] = state[f'{at}{theirs}.weight'].T
      out[f'{ours}/bias'] = state[f'{at}{theirs}.bias']
  return out


def big_vision(model, stacked=False):
  """{key: array} of a SigLIP as big_vision's `.npz` files have it."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  kernel = state['embeddings.patch_embedding.weight']
  out = {
    'img/embedding/kernel': kernel.transpose(2, 3, 1, 0),
    'img/embedding/bias': state['embeddings.patch_embedding.bias'],
    'img/pos_embedding': state['embeddings.position_embedding.weight'][None],
    'img/MAPHead_0/probe': np.zeros((1, 1, 4), np.float32),
    'img/Transformer/encoder_norm/scale': state['post_layernorm.weight'],
    'img/Transformer/encoder_norm/bias': state['post_layernorm.bias'],
    'txt/Embed_0/embedding': np.zeros((3, 4), np.float32),
    't': np.zeros([1], np.float32),
    'b': np.zeros([1], np.float32),
  }
  c = model.config
  blocks = [
    _big_vision_block(state, f'encoder.layers.{i}.', c.num_attention_heads)
    for i in range(c.num_hidden_layers)
  ]
  at = 'img/Transformer/encoderblock'
  for key in blocks[0]:
    values = [block[key] for block in blocks]
    if stacked:
      out[f'{at}/{key}'] = np.stack(values)
    else:
      out |= {f'{at}_{i}/{key}': value for i, value in enumerate(values)}
  return {f'params/{key}': value for key, value in out.items()}
