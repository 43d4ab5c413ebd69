"""What `bench.py` measures against: the same networks and steps in PyTorch.

Written from the papers and from torchvision's and transformers' conventions,
with what PyTorch has that is fast: one product for q, k and v, its own fused
attention, fused AdamW, foreach averages. `rae_step` differentiates as RAE's
trainer does (arXiv 2510.11690): two gradients to the decoder's last layer for
the adaptive weight, then one of the sum, through the losses' networks again.
`clever_step` does our step's work: the losses' gradients at the image once,
the weight from products at the head, one backward, real and fake in one call.
"""

import contextlib
import math

import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
  def __init__(self, width, mlp, num_heads, approximate):
    super().__init__()
    self.heads, self.approximate = num_heads, approximate
    self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6) for _ in range(2))
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

  def forward(self, x):
    b, n, d = x.shape
    qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
    y = F.gelu(self.fc1(self.norm2(x)), approximate=self.approximate)
    return x + self.fc2(y)


class ViT(nn.Module):
  """Tokens [b n c] -> [b n d], or a list of the blocks' outputs `taps`."""

  def __init__(self, inputs, tokens, vit, prefix=0):
    super().__init__()
    width = vit['width']
    self.embed = nn.Linear(inputs, width)
    self.positions = nn.Parameter(0.02 * torch.randn(prefix + tokens, width))
    self.prefix = nn.Parameter(0.02 * torch.randn(1, prefix, width))
    gelu = 'tanh' if vit.get('act') == 'gelu_tanh' else 'none'
    self.blocks = nn.ModuleList(
      Block(width, vit['mlp_dim'], vit['num_heads'], gelu)
      for _ in range(vit['depth'])
    )

  def forward(self, x, taps=()):
    x = self.embed(x)
    prefix = self.prefix.expand(len(x), -1, -1).to(x.dtype)
    x = torch.cat([prefix, x], 1) + self.positions
    outputs = []
    for block in self.blocks:
      x = block(x)
      outputs.append(x)
    n = self.prefix.shape[1]
    return [outputs[i][:, n:] for i in taps] if taps else x


def patches(x, p):
  """[b 3 h w] -> [b n 3 p p]."""
  b, c, h, w = x.shape
  x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
  return x.reshape(b, (h // p) * (w // p), c * p * p)


def images_of(x, p, side):
  """The inverse of `patches`."""
  n = side // p
  x = x.view(len(x), n, n, 3, p, p).permute(0, 3, 1, 4, 2, 5)
  return x.reshape(len(x), 3, side, side)


class Encoder(nn.Module):
  """[b 3 h w] in [0, 1] -> latents [b n d], a last norm without parameters."""

  def __init__(self, vit, tokens):
    super().__init__()
    self.patch = vit['patch_size']
    self.vit = ViT(3 * self.patch**2, tokens, vit)
    self.norm = nn.LayerNorm(vit['width'], 1e-6, elementwise_affine=False)

  def forward(self, x):
    return self.norm(self.vit(patches(2 * x - 1, self.patch)))


class Tokenizer(nn.Module):
  """Encoder, SimVQ by cosine, decoder."""

  def __init__(self, encoder, decoder, side, codes, code_dim):
    super().__init__()
    p, width = decoder['patch_size'], encoder['width']
    tokens = (side // p) ** 2
    self.side, self.patch = side, p
    self.encoder = Encoder(encoder, tokens).requires_grad_(False)
    self.project_in = nn.Linear(width, code_dim)
    self.project_out = nn.Linear(code_dim, width)
    self.map = nn.Linear(code_dim, code_dim)
    self.register_buffer('basis', torch.randn(codes, code_dim))
    self.decoder = ViT(width, tokens, decoder, prefix=1)
    self.norm = nn.LayerNorm(decoder['width'], 1e-6)
    self.head = nn.Linear(decoder['width'], 3 * p * p)

  def rows(self, basis):
    with torch.autocast(self.basis.device.type, enabled=False):
      return F.normalize(self.map(basis), dim=-1)

  def nearest(self, z, table):
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
      return (z.float() @ table.float().T).argmax(-1)

  def encode(self, x):
    """Indices [b n]; the table is given at inference."""
    z = F.normalize(self.project_in(self.encoder(x)).float(), dim=-1)
    return self.nearest(z, self.basis)

  def decode(self, indices):
    return self.pixels(self.basis[indices])[0].clamp(0, 1)

  def pixels(self, codes):
    x = self.norm(self.decoder(self.project_out(codes)))
    y = self.head(x)[:, 1:].float()
    std = y.new_tensor(STD).view(3, 1, 1)
    mean = y.new_tensor(MEAN).view(3, 1, 1)
    return images_of(y, self.patch, self.side) * std + mean, x

  def forward(self, latents, few=False):
    """(image, features before the head, the quantizer's losses).

    few: whether the map's gradient is of the rows that were read.
    """
    z = F.normalize(self.project_in(latents).float(), dim=-1)
    with torch.set_grad_enabled(not few):
      table = self.rows(self.basis)
    scale, indices = math.sqrt(table.shape[-1]), self.nearest(z, table)
    codes = self.rows(self.basis[indices]) if few else table[indices]
    codes, z = scale * codes, scale * z
    losses = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(
      z, codes.detach()
    )
    return *self.pixels(z + (codes - z).detach()), losses


class Discriminator(nn.Module):
  """Five heads on a frozen ViT-S/8 at 224 pixels."""

  def __init__(self, vit, taps, kernel):
    from tests.nn.torch_discriminators import Head

    super().__init__()
    self.patch, self.taps = vit['patch_size'], taps
    self.size = vit['grid'][0] * self.patch
    tokens = vit['grid'][0] ** 2
    self.vit = ViT(3 * self.patch**2, tokens, vit, 1).requires_grad_(False)
    self.heads = nn.ModuleList(Head(vit['width'], kernel) for _ in taps)

  def forward(self, x):
    x = F.interpolate(x, self.size, mode='bilinear')
    x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
    taps = self.vit(patches(x, self.patch), self.taps)
    pairs = zip(self.heads, taps, strict=True)
    return torch.cat([head(tap.transpose(1, 2)) for head, tap in pairs], 1)


def augmented(x):
  """DiffAug: translation, brightness, saturation, contrast."""
  b, _, h, w = x.shape
  draw = lambda: torch.rand(b, 1, 1, 1, device=x.device)  # noqa: E731
  x = 2 * x - 1
  most = round(h / 8), round(w / 8)
  rows, columns = (
    torch.randint(-m, m + 1, (b, 1), device=x.device)
    + torch.arange(n, device=x.device)
    + m
    for m, n in zip(most, (h, w), strict=True)
  )
  x = F.pad(x, (most[1],) * 2 + (most[0],) * 2).permute(0, 2, 3, 1)
  batch = torch.arange(b, device=x.device)[:, None, None]
  x = x[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
  x = x + draw() - 0.5
  grey = x.mean(1, keepdim=True)
  x = (x - grey) * 2 * draw() + grey
  mean = x.mean((1, 2, 3), keepdim=True)
  return ((x - mean) * (draw() + 0.5) + mean + 1) / 2


class Trainer:
  """Both steps over one set of networks.

  Args:
    tokenizer: a `Tokenizer`.
    discriminator: a `Discriminator`.
    autocast: whether products run in bf16.
  """

  def __init__(self, tokenizer, discriminator, autocast):
    from tests.losses.torch_networks import VGG16, heads

    self.tokenizer, self.discriminator = tokenizer, discriminator
    self.device = next(tokenizer.parameters()).device
    self.vgg = VGG16().requires_grad_(False)
    self.linear = heads().requires_grad_(False)
    self.autocast = autocast
    self.trained = [p for p in tokenizer.parameters() if p.requires_grad]
    self.learning = [p for p in discriminator.parameters() if p.requires_grad]
    self.optimizers = [
      torch.optim.AdamW(p, 1e-4, (0.9, 0.999), weight_decay=1e-4, fused=True)
      for p in (self.trained, self.learning)
    ]
    self.average = [p.detach().clone() for p in self.trained]

  def cast(self):
    if not self.autocast:
      return contextlib.nullcontext()
    return torch.autocast(self.device.type, torch.bfloat16)

  def image_loss(self, recon, images):
    from tests.losses.torch_networks import lpips

    distance = lpips(self.vgg, self.linear, recon, images)
    return F.mse_loss(recon, images) + distance.mean()

  def weight(self, rec, gan):
    return (rec / (gan + 1e-6)).clamp(0, 1e4)

  def update(self, which, params):
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    self.optimizers[which].step()
    self.optimizers[which].zero_grad()

  def finish(self, images, recon, together):
    """The optimizer, the average, the discriminator's step."""
    self.update(0, self.trained)
    torch._foreach_lerp_(self.average, self.trained, 0.001)
    for p in self.learning:
      p.requires_grad_(True)
    pair = augmented(images), augmented(recon.detach().clamp(0, 1))
    with self.cast():
      if together:
        real, fake = self.discriminator(torch.cat(pair)).chunk(2)
      else:
        real, fake = map(self.discriminator, pair)
      loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    loss.backward()
    self.update(1, self.learning)

  def start(self, images, few=False):
    for p in self.learning:
      p.requires_grad_(False)
    with self.cast():
      with torch.no_grad():
        latents = self.tokenizer.encoder(images)
      return self.tokenizer(latents, few)

  def rae_step(self, images):
    recon, _, codes = self.start(images)
    with self.cast():
      rec = self.image_loss(recon, images)
      gan = -self.discriminator(augmented(recon)).mean()
    last = self.tokenizer.head.weight
    norms = [
      torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
      for loss in (rec, gan)
    ]
    (rec + 0.75 * self.weight(*norms) * gan + codes).backward()
    self.finish(images, recon, together=False)

  def clever_step(self, images):
    tokens = len(images) * (self.tokenizer.side // self.tokenizer.patch) ** 2
    few = 2 * tokens <= len(self.tokenizer.basis)
    recon, features, codes = self.start(images, few)
    leaf = recon.detach().requires_grad_()
    with self.cast():
      rec = self.image_loss(leaf, images)
      gan = -self.discriminator(augmented(leaf)).mean()
    grads = [torch.autograd.grad(loss, leaf)[0] for loss in (rec, gan)]
    inner = features.detach()[:, 1:].flatten(0, 1).float()
    norms = [
      (inner.T @ patches(g, self.tokenizer.patch).flatten(0, 1)).norm()
      for g in grads
    ]
    image = grads[0] + 0.75 * self.weight(*norms) * grads[1]
    torch.autograd.backward([recon, codes], [image, torch.ones_like(codes)])
    self.finish(images, recon, together=True)
