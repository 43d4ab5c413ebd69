"""What `cifar.py` measures against: its ViTs in PyTorch around a quantizer of
vector-quantize-pytorch."""

import numpy as np
import torch
import vector_quantize_pytorch
from torch import nn

from benchmarks import torch_peers
from vqrae_jax.ops import posemb


class Autoencoder(nn.Module):
  """[b h w 3] in [0, 1] -> (the reconstruction, indices, the quantizer's
  loss)."""

  def __init__(self, vit, kind, fields):
    super().__init__()
    self.patch, (self.rows, self.columns) = vit['patch_size'], vit['grid']
    width, values = vit['width'], 3 * self.patch**2
    tokens = self.rows * self.columns
    self.encoder = torch_peers.ViT(values, tokens, vit)
    self.norm_in, self.norm_out = (nn.LayerNorm(width, 1e-6) for _ in range(2))
    make = getattr(vector_quantize_pytorch, kind)
    self.quantizer = make(dim=width, **fields)
    self.decoder = torch_peers.ViT(width, tokens, vit)
    self.head = nn.Linear(width, values)
    fixed = posemb.sincos2d(width, vit['grid'], vit['grid'])
    del self.decoder.positions
    self.decoder.register_buffer('positions', torch.from_numpy(fixed))

  def forward(self, x):
    b, p, m, n = len(x), self.patch, self.rows, self.columns
    x = (x - 0.5) / 0.5
    x = x.view(b, m, p, n, p, 3).transpose(2, 3).reshape(b, m * n, -1)
    z = self.norm_in(self.encoder(x))
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    z, indices, *loss = self.quantizer(z)
    matmul.allow_tf32 = before
    x = self.head(self.norm_out(self.decoder(z)))
    x = x.view(b, m, n, p, p, 3).transpose(2, 3).reshape(b, m * p, n * p, 3)
    return x * 0.5 + 0.5, indices, loss[0] if loss else 0.0


def carry(net, leaves):
  """The leaves of our tokenizer, by name, into `net`."""

  def fill(parameter, array):
    with torch.no_grad():
      parameter.copy_(torch.from_numpy(np.array(array)).view_as(parameter))

  def linear(module, *names):
    fill(
      module.weight, np.concatenate([leaves[f'{n}/kernel'].T for n in names])
    )
    fill(module.bias, np.concatenate([leaves[f'{n}/bias'] for n in names]))

  def norm(module, name):
    fill(module.weight, leaves[f'{name}/scale'])
    fill(module.bias, leaves[f'{name}/bias'])

  leaves = dict(leaves)
  for part in ('encoder', 'decoder'):
    vit, blocks = getattr(net, part), f'{part}/transformer/blocks'
    for name in [n for n in leaves if n.startswith(f'{blocks}/')]:
      for i, row in enumerate(leaves.pop(name)):
        leaves[name.replace('blocks', f'{i}')] = row
    linear(vit.embed, f'{part}/embed/linear')
    for i, block in enumerate(vit.blocks):
      at = f'{part}/transformer/{i}'
      norm(block.norm1, f'{at}/norm1')
      norm(block.norm2, f'{at}/norm2')
      qkv = [f'{at}/attention/{n}' for n in ('query', 'key', 'value')]
      linear(block.qkv, *qkv)
      linear(block.out, f'{at}/attention/out')
      linear(block.fc1, f'{at}/mlp/fc1')
      linear(block.fc2, f'{at}/mlp/fc2')
  fill(net.encoder.positions, leaves['encoder/embed/positions'])
  norm(net.norm_in, 'encoder/norm')
  norm(net.norm_out, 'decoder/norm')
  linear(net.head, 'decoder/head')
  if 'quantizer/project_in/kernel' in leaves:
    linear(net.quantizer.project_in, 'quantizer/project_in')
    linear(net.quantizer.project_out, 'quantizer/project_out')
