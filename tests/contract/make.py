"""Writes the contract: what a user had at commit 0d4c29b, as files.

    python -m tests.contract.make [NAME …]

Tokenizers and encoders as they lie on disk, with what they compute; recipes as
resolved; names of leaves, flags, config keys and metrics; random weights; the
order of samples; 20 steps of four runs. `test_contract.py` holds the code to
them.

The files were written once, before the code was rebuilt. Renew one only where
a format or a result is meant to change, in the commit that says so; a name
that changed is a row of `renames.py` instead.

The runs are chosen so that rounding cannot grow (`tests/golden/make_metrics.py`
has the reasons): a large eps in Adam, tokens that are apart, reconstructions
that are not flat, because weights come from the tokenizers stored here.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
from typing import Any

from tests import flags

if __name__ == '__main__':  # before JAX starts; the suite's own in a test
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = flags.devices(1)

import jax
import numpy as np
from PIL import Image

import vqrae_jax
from tests.contract import entry_points

GOLDEN = pathlib.Path(__file__).with_name('golden')
CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'

# -- tokenizers ----------------------------------------------------------------
_VIT = dict(
  width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, grid=(4, 4)
)
_DECODER = _VIT | dict(posemb='sincos2d', num_prefix_tokens=1, norm_eps=1e-12)
_FSQ = dict(name='fsq', levels=(5, 4, 3), convention='centered')
_VQ = dict(name='vq', num_codes=48)
_SIMVQ = dict(name='simvq', num_codes=48, code_dim=12)


def _model(quantizer: dict, encoder: Any = None, **more: Any) -> dict:
  return dict(
    encoder=encoder or dict(vit=_VIT),
    quantizer=quantizer,
    decoder=dict(vit=_DECODER),
    **more,
  )


_OTHER_ENCODER = dict(
  vit=_VIT
  | dict(
    patch_size=5, norm='rms', act='swiglu', qk_norm=True, qkv_bias=False,
    layer_scale=0.5, num_prefix_tokens=3, num_registers=2,
    prefix_has_posemb=True,
  ),
  pixel_norm=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
  output_norm='plain',
  resize='bilinear',
)  # fmt: skip
MODELS = {
  'none': _model(dict(name='none')),
  'fsq-cosmos': _model(
    dict(name='fsq', levels=(8, 8, 8, 5, 5, 5), convention='cosmos')
  ),
  'fsq-centered': _model(_FSQ),
  'fsq-mlp-fourier': _model(
    _FSQ | dict(bound='clip', adapter_in='mlp', adapter_out='fourier')
  ),
  'vq-ema': _model(_VQ),
  'vq-gradient': _model(
    _VQ | dict(update='gradient', projection=True, code_dim=12)
  ),
  'simvq-l2': _model(_SIMVQ),
  'simvq-l2-normal': _model(
    _SIMVQ | dict(normalize=False, basis_init='normal', basis_std=0.5)
  ),
  'simvq-cosine': _model(_SIMVQ | dict(distance='cosine')),
  'simvq-cosine-unit': _model(
    _SIMVQ | dict(distance='cosine', code_scale='unit', token_map=True)
  ),
  'simvq-cosine-rows': _model(
    _SIMVQ | dict(distance='cosine', code_scale='none')
  ),
  'latents-channel': _model(_VQ, latents=dict(norm='channel')),
  'latents-position': _model(
    _SIMVQ, latents=dict(norm='position', grid=(4, 6))
  ),
  'post-quant-code': _model(_FSQ | dict(post_quant=dict(kernel=3))),
  'post-quant-latent': _model(
    _SIMVQ | dict(post_quant=dict(kernel=1, space='latent'))
  ),
  'other-encoder': _model(_FSQ, _OTHER_ENCODER),
}


ZIPPED = ('fsq-mlp-fourier',)  # an MLP 512 wide, mostly zeros


def flat(tree: Any) -> dict[str, Any]:
  """{leaf name: leaf}; names join keys and fields with "/"."""

  def name(path):
    parts = (getattr(p, 'key', getattr(p, 'name', None)) for p in path)
    return '/'.join(map(str, parts))

  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {name(path): leaf for path, leaf in leaves}


def pictures(height: int = 16, width: int = 24) -> np.ndarray:
  """uint8 [2 h w 3], smooth, without random numbers."""
  y, x, c = np.mgrid[:height, :width, :3]
  waves = [np.sin(x / (3 + c) + i) + np.cos(y / (2 + i) - c) for i in (0, 1)]
  return np.round(np.stack(waves) * 60 + 127).astype(np.uint8)


def _uneven(name: str, leaf: jax.Array, rng: np.random.Generator) -> np.ndarray:
  """A leaf off its first value, so that no bias is 0 and no scale 1, tokens
  are apart and reconstructions not flat."""
  leaf = np.asarray(leaf)
  if name == 'codebook/latents/std':
    return rng.uniform(0.5, 2, leaf.shape).astype('f4')
  factor = {'params/encoder/embed/positions': 50}
  noise = rng.normal(0, 0.02 if '/head/' in name else 0.1, leaf.shape)
  leaf = leaf * factor.get(name, 1) + noise
  if leaf.shape == (512, 512):  # of a width that no config changes
    leaf *= np.add.outer(np.arange(512) * 7, np.arange(512)) % 64 == 0
  return leaf.astype('f4')


def outputs(tokenizer: Any, variables: Any, images: Any) -> dict[str, Any]:
  """What the public API says of images."""

  @jax.jit
  def all_of_it(variables, images):
    latents = vqrae_jax.encode(tokenizer, variables, images)
    out = vqrae_jax.reconstruct(tokenizer, variables, images)
    found = {'latents': latents, 'reconstruction': out.images}
    if tokenizer.codebook_size:
      args = tokenizer, variables
      indices = vqrae_jax.encode_to_indices(*args, images)
      decoded = vqrae_jax.decode_from_indices(*args, indices)
      found |= {'indices': indices, 'decoded': decoded}
    return found

  return jax.device_get(all_of_it(variables, images))


def write_tokenizers() -> None:
  (GOLDEN / 'tokenizers').mkdir(parents=True, exist_ok=True)
  for name, model in MODELS.items():
    tokenizer = vqrae_jax.build_tokenizer(model)
    images, rng = pictures(), np.random.default_rng(1)
    variables = jax.jit(tokenizer.init)(jax.random.key(0), images)
    leaves = [_uneven(n, x, rng) for n, x in flat(variables).items()]
    variables = jax.tree.unflatten(jax.tree.structure(variables), leaves)
    path = GOLDEN / 'tokenizers' / name
    entry_points.save_tokenizer(tokenizer, variables, path)
    found = outputs(*vqrae_jax.load_tokenizer(path), images)
    found.pop('decoded', None)  # the reconstruction, clipped
    np.savez_compressed(f'{path}.npz', images=images, **found)
    if name in ZIPPED:
      shutil.make_archive(str(path), 'zip', path)
      shutil.rmtree(path)


def tokenizer_path(name: str, folder: pathlib.Path) -> pathlib.Path:
  """The directory of a stored tokenizer; in `folder` where it is unpacked."""
  path = GOLDEN / 'tokenizers' / name
  if name in ZIPPED:
    shutil.unpack_archive(f'{path}.zip', folder / name)
    return folder / name
  return path


# -- encoders ------------------------------------------------------------------
ENCODERS = (
  'siglip', 'naflex', 'dinov2-swiglu', 'dinov2-registers', 'mae',
  'internvit-300m', 'internvit-6b',
)  # fmt: skip
NORMS = ('affine', 'plain', 'none')


def features(path: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
  """{output_norm: f32[b gh gw d]}; all three of one family only."""
  found = {}
  for norm in NORMS[: 3 if path.name == 'siglip' else 1]:
    encoder, variables = vqrae_jax.load_encoder(str(path), output_norm=norm)
    found[norm] = np.asarray(jax.jit(encoder.apply)(variables, images))
  return found


def write_encoders() -> None:
  from tests.encoders import references  # PyTorch, for the writing alone

  root = GOLDEN / 'encoders'
  root.mkdir(parents=True, exist_ok=True)
  sizes = dict(width=16, depth=2, heads=2, mlp=24, pixels=16, patch=4)
  images = pictures(18, 24).astype('f4') / np.float32(255)
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    for kind in ENCODERS:
      references.make(kind, **sizes).save_pretrained(kind)
      args = [f'--source={kind}', f'--out={root / kind}']
      entry_points.COMMANDS['convert'](args)
      found = features(root / kind, images)
      np.savez_compressed(root / f'{kind}.npz', images=images, **found)


# -- recipes -------------------------------------------------------------------
ARGUMENTS = {
  'two_stages_small': (
    'stage=0',
    'stage=1',
    'lpips=false,gan=false',
    'stage=2',
    'stage=2,distill=self',
    'stage=2,gan=false',
    'stage=2,frozen=true,distill=none',
  ),
  'quickstart': ('steps=60,lr=1e-3',),
  'simvq_siglip_l': ('stage=2', 'frozen=false', 'stage=2,open=6,decay=0.8'),
  'simvq_siglip2_l': ('stage=2', 'preset=paper', 'preset=paper,stage=2'),
  'internvit_6b': ('decoder=symmetric', 'decoder=B', 'decoder=L', 'stage=2'),
  'paper_siglip2_so400m': ('stage=2',),
  'paper_internvit_300m': ('stage=2',),
}


def recipes() -> dict[str, dict]:
  """{"NAME[:ARGUMENTS]": its config, all defaults filled in}."""
  names = sorted(p.stem for p in CONFIGS.glob('[!_]*.py'))
  found = {}
  for name in names:
    for words in (None, *ARGUMENTS.get(name, ())):
      if name == 'common':
        continue
      config = entry_points.resolved(entry_points.recipe(name, words))
      found[f'{name}:{words}' if words else name] = config
  return found


# -- names ---------------------------------------------------------------------
_SMALL_DINO = dict(
  name='dino',
  vit=dict(width=16, depth=3, mlp_dim=24, num_heads=2, grid=(2, 2)),
  taps=(2, 0),
  kernel=3,
)
DISCRIMINATORS = {
  'patch': dict(name='patch', hidden=8, halvings=2, groups=4, pool=0),
  'dino': _SMALL_DINO,
}


def _shapes(tree: Any) -> dict[str, str]:
  return {n: f'{x.dtype} {list(x.shape)}' for n, x in flat(tree).items()}


def leaves() -> dict[str, dict[str, str]]:
  """{network: {leaf name: type and shape}}."""
  key = jax.random.key(0)
  found = {}
  for name, model in MODELS.items():
    tokenizer = vqrae_jax.build_tokenizer(model)
    found[name] = jax.eval_shape(tokenizer.init, key, pictures())
  for name, section in DISCRIMINATORS.items():
    module, image = (
      entry_points.discriminator(section),
      np.zeros((1, 16, 16, 3)),
    )
    image = image.astype('f4')
    found[f'discriminator {name}'] = jax.eval_shape(module.init, key, image)
  for term in ('lpips', 'convnext'):
    drawn = jax.eval_shape(lambda t=term: entry_points.loss_network(t, key))
    found[f'loss {term}'] = drawn
  return {name: _shapes(tree) for name, tree in found.items()}


def command_flags() -> dict[str, dict[str, str | None]]:
  """{command: {flag: default}}, by what --help prints."""
  found = {}
  for name, main in entry_points.COMMANDS.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
      main(['--help'])
    found[name] = entry_points.flags_of(out.getvalue())
  return found


def names() -> dict[str, Any]:
  """The public API, config keys with their defaults, what they may name."""
  return {
    'api': entry_points.signatures(),
    'config': entry_points.config_keys(),
    'choices': {k: sorted(v) for k, v in entry_points.CHOICES.items()},
  }


# -- random weights ------------------------------------------------------------
def _marks(leaf: Any) -> list[float]:
  """What tells a leaf's values from others: mean, RMS, first, last, and their
  product with a fixed vector, which another order changes."""
  x = np.asarray(leaf, np.float64).ravel()
  against = np.sin(np.arange(x.size) * 0.7 + 0.3) @ x / x.size**0.5
  rms = np.sqrt(np.mean(x * x))
  return [float(f'{v:.9g}') for v in (x.mean(), rms, x[0], x[-1], against)]


COMMON = ('params/encoder/', 'params/decoder/')
# Drawn as others are: nothing to see in them that those do not show.
SAME_LEAVES = {
  'fsq-cosmos', 'simvq-cosine', 'simvq-cosine-rows', 'latents-channel',
  'latents-position', 'post-quant-latent',
}  # fmt: skip


def initial() -> dict[str, dict[str, list[float]]]:
  """{network: {leaf: marks}} of seed 0, alone and as runs begin."""
  key, found = jax.random.key(0), {}
  for name in sorted(set(MODELS) - SAME_LEAVES):
    tokenizer = vqrae_jax.build_tokenizer(MODELS[name])
    # What is drawn as in "none" is not compiled again.
    common = () if name in ('none', 'other-encoder') else COMMON
    found[name] = jax.jit(
      lambda key, init=tokenizer.init, common=common: {
        n: x
        for n, x in flat(init(key, pictures())).items()
        if not n.startswith(common)
      }
    )(key)
  module = entry_points.discriminator(_SMALL_DINO)
  image = pictures(16, 16)[:1] / np.float32(255)
  found['discriminator dino'] = flat(jax.jit(module.init)(key, image))
  config = RUNS['gan'](pathlib.Path()) | dict(init_from=None)
  found['run gan'] = entry_points.initial_state(config)
  return {
    name: {n: _marks(x) for n, x in leaves.items() if x.size}
    for name, leaves in found.items()
  }


# -- samples -------------------------------------------------------------------
def _png(i: int) -> bytes:
  """An image of its own size for each i."""
  h, w = 18 + 3 * (i % 3), 17 + 5 * (i % 4)
  y, x, c = np.mgrid[:h, :w, :3]
  values = (x * 7 + y * 13 + c * 29 + i * 31) ** 2 % 251
  out = io.BytesIO()
  Image.fromarray(values.astype(np.uint8)).save(out, 'PNG')
  return out.getvalue()


def _tar(path: pathlib.Path, members: dict[str, bytes]) -> None:
  with tarfile.open(path, 'w') as file:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))


def write_sources(root: pathlib.Path) -> dict[str, str]:
  """{kind: DATA} of sources with few images, and one with more than 4096,
  from which on another generator draws the order."""
  from array_record.python import array_record_module

  images = [_png(i) for i in range(5)]
  for i, data in enumerate(images):
    path = root / 'folder' / ('deep' if i % 2 else '') / f'image{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  for shard, rows in enumerate((images[:3], images[3:])):
    members = {f'{shard}{i}.png': data for i, data in enumerate(rows)}
    _tar(root / f'shard-{shard}.tar', members)
    writer = array_record_module.ArrayRecordWriter(
      str(root / f'records-{shard}.array_record'), 'group_size:1'
    )
    for data in rows:
      writer.write(data)
    writer.close()
  many = {f'{i:04d}.png': images[i % 5] for i in range(4100)}
  _tar(root / 'many.tar', many)
  return {
    'folder': str(root / 'folder'),
    'tar': str(root / 'shard-{0,1}.tar'),
    'array_record': str(root / 'records-*.array_record'),
    'many': str(root / 'many.tar'),
    'bundled:photos': 'bundled:photos',
  }


CROPPED = dict(size=(16, 16))
RESIZED = dict(size=(16, 12), resize=(16, 24))


def rows(
  data: str, augment: dict, seed: int, hosts: int = 1
) -> list[list[str]]:
  """[name, SHA-256 of the crop] of the first 8 samples, over all hosts."""
  batches = [
    entry_points.samples(
      data, augment, steps=2, batch_size=4, seed=seed, process_index=host,
      process_count=hosts,
    )
    for host in range(hosts)
  ]  # fmt: skip
  every = [row for step in zip(*batches, strict=True) for row in step]
  return [
    [name, hashlib.sha256(image.tobytes()).hexdigest()]
    for name, image in itertools.chain(*every)
  ]


def samples(root: pathlib.Path) -> dict[str, list[list[str]]]:
  """{"KIND seed N": the first samples}."""
  found = {}
  for kind, data in write_sources(root).items():
    for seed in (0, 1):
      found[f'{kind} seed {seed}'] = rows(data, CROPPED, seed)
    if kind == 'folder':
      found[f'{kind} resized'] = rows(data, RESIZED, 0)
  return found


# -- runs ----------------------------------------------------------------------
STEPS = 20
_ADAM = dict(b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip=1.0)
_RATE = dict(lr=3e-3, end_lr=3e-4, warmup=3)
_OPEN, _FROZEN = (('.*', _RATE),), (('encoder/.*', None), ('.*', _RATE))
_CODES = dict(l2=1.0, commit=0.25, codebook=1.0)


def _stored(name: str) -> str:
  return str(GOLDEN / 'tokenizers' / name)


def _run(model: str, **keys: Any) -> dict:
  config = dict(
    model=MODELS[model],
    data=dict(
      source='bundled:photos',
      include=('astronaut', 'chelsea', 'coffee'),  # PNG: one decoding
      image_size=16,
      resize=(16, 32),
    ),
    schedules=_OPEN,
    optim=_ADAM,
    duration=STEPS,
    batch_size=8,
    ema=0.9,
    log=dict(every=1, images_every=0, usage_window=5, tensorboard=False),
    checkpoint=dict(every=STEPS, keep=1),
  )
  return config | keys


def _discriminator(**keys: Any) -> dict:
  fields = {k: v for k, v in DISCRIMINATORS['patch'].items() if k != 'name'}
  return dict(name='patch', fields=fields, schedule=_RATE, optim=_ADAM) | keys


# {name: folder of the other runs -> config}
RUNS = {
  'plain': lambda at: _run(
    'simvq-l2',
    losses=_CODES,
    schedules=_FROZEN,
    init=dict(encoder=_stored('simvq-l2')),
    eval=dict(source='bundled:photos', include=('coffee',), tile=64, every=10),
  ),
  'gan': lambda at: _run(
    'vq-ema',
    losses=dict(l2=1.0, commit=0.25, gan=dict(weight=0.5, start=4, ramp=3)),
    discriminator=_discriminator(
      lecam=0.1, start='2 steps', schedule=_RATE | dict(lr=1e-3)
    ),
    init_from=_stored('vq-ema'),
  ),
  'accumulation': lambda at: _run(
    'fsq-centered',
    losses=dict(l2=1.0, commit=0.25, gan=0.5),
    discriminator=_discriminator(loss='non_saturating', r1=0.1, cutout=0.25),
    accumulate=2,
    noise_tau=0.1,
    init_from=_stored('fsq-centered'),
  ),
  'stage 2': lambda at: _run(
    'simvq-l2',
    losses=_CODES | dict(distill=1.0),
    init_from=str(at / 'plain'),
    teacher='init',
    seed=1,
  ),
}


def trajectory(workdir: pathlib.Path) -> list[dict]:
  """The rows of a run's metrics.jsonl."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


# `samples` is a check sum of the sample order, which data.json holds.
CLOCKS = ('images_per_second', 'data_wait')
LEFT_OUT = (*CLOCKS, 'samples')


def without(row: dict, fields: tuple[str, ...]) -> dict:
  return {k: v for k, v in row.items() if k not in fields}


# ------------------------------------------------------------------------------
def _write(name: str, value: Any) -> None:
  """JSON: a line for each of the second level's entries."""
  lines = []
  for key, inner in value.items():
    pairs = inner.items() if isinstance(inner, dict) else None
    if pairs is None:
      text = ',\n'.join(f'  {json.dumps(row, sort_keys=True)}' for row in inner)
      lines.append(f' {json.dumps(key)}: [\n{text}\n ]')
      continue
    text = ',\n'.join(
      f'  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}'
      for k, v in sorted(pairs)
    )
    lines.append(f' {json.dumps(key)}: {{\n{text}\n }}')
  text = '{\n' + ',\n'.join(lines) + '\n}\n'
  (GOLDEN / f'{name}.json').write_text(text)


def write_runs(at: pathlib.Path) -> None:
  """trajectories.json, and what checkpoints and rows have names for."""
  found, metrics, state = {}, {}, {}
  for name, config in RUNS.items():
    entry_points.train(config(at), at / name)
    every = trajectory(at / name)
    found[name] = [without(row, LEFT_OUT) for row in every]
    metrics[name] = sorted({k for row in every for k in row} - {'samples'})
    state[name] = entry_points.checkpoint_leaves(at / name, STEPS)
  _write('trajectories', found)
  _write('checkpoints', state)
  _write('metrics', metrics)


def main(wanted: list[str]) -> None:
  GOLDEN.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    at = pathlib.Path(folder)
    os.environ['VQRAE_JAX_CACHE'] = str(at / 'cache')
    makers = {
      'tokenizers': write_tokenizers,
      'encoders': write_encoders,
      'recipes': lambda: _write('recipes', recipes()),
      'leaves': lambda: _write('leaves', leaves()),
      'init': lambda: _write('init', initial()),
      'data': lambda: _write('data', samples(at)),
      'flags': lambda: _write('flags', command_flags()),
      'names': lambda: _write('names', names()),
      'trajectories': lambda: write_runs(at),
    }
    for name in wanted or makers:
      makers[name]()
      print('wrote', name)


if __name__ == '__main__':
  main(sys.argv[1:])
