"""What the code does today of each thing that a golden file holds.

Golden files say what a user has; how the test gets at it stands here alone, so
that a moved or renamed module changes one line of this file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import json
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import vqrae_jax
from tests.data import makers
from vqrae_jax import (
  convert,
  fetch_weights,
  latent_stats,
  reconstruct_images,
  specs,
)
from vqrae_jax.data import pipeline, sources
from vqrae_jax.encoders import ENCODERS
from vqrae_jax.losses import (
  FROZEN_TERMS,
  IMAGE_TERMS,
  LATENT_TERMS,
  adversarial,
)
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.models.tokenizer import describe
from vqrae_jax.nn import discriminators
from vqrae_jax.pretrained import networks
from vqrae_jax.quantizers import QUANTIZERS
from vqrae_jax.train import __main__ as train_main
from vqrae_jax.train import checkpoint, initialize, loop, setup
from vqrae_jax.train import config as config_lib

GOLDEN = pathlib.Path(__file__).with_name('golden')

COMMANDS = {
  'train': train_main.main,
  'reconstruct_images': reconstruct_images.main,
  'convert': convert.main,
  'fetch_weights': fetch_weights.main,
  'latent_stats': latent_stats.main,
}
CHOICES = {
  'encoder': ENCODERS,
  'decoder': [*DECODERS, 'symmetric'],
  'quantizer': QUANTIZERS,
  'loss': [*IMAGE_TERMS, *FROZEN_TERMS, *LATENT_TERMS, 'gan'],
  'discriminator': discriminators.DISCRIMINATORS,
}
# Sections of a config as the classes that hold their keys and defaults.
_SECTIONS = {
  '': config_lib.RunConfig,
  'losses.*': config_lib.LossTerm,
  'losses.distill': config_lib.DistillTerm,
  'losses.gan': config_lib.GanTerm,
  'schedules.*': config_lib.Schedule,
  'model.encoder': specs.EncoderSpec,
  'model.decoder': specs.DecoderSpec,
  'model.latents': specs.LatentsSpec,
  **{f'model.quantizer.{n}': c for n, c in QUANTIZERS.items()},
  **{
    f'discriminator.fields.{n}': c
    for n, c in discriminators.DISCRIMINATORS.items()
  },
}


def golden(name: str) -> Any:
  return json.loads((GOLDEN / f'{name}.json').read_text())


def flat(tree: Any) -> dict[str, Any]:
  """{leaf name: leaf}; names join keys and fields with "/"."""

  def name(path):
    parts = (getattr(p, 'key', getattr(p, 'name', None)) for p in path)
    return '/'.join(map(str, parts))

  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {name(path): leaf for path, leaf in leaves}


def _plain(value: Any) -> Any:
  """JSON's types alone."""
  return json.loads(
    json.dumps(
      value, default=lambda x: dict(x) if isinstance(x, Mapping) else vars(x)
    )
  )


# -- tokenizers and encoders ---------------------------------------------------
TOKENIZERS = sorted(p.stem for p in (GOLDEN / 'tokenizers').glob('*.npz'))
FAMILIES = sorted(p.stem for p in (GOLDEN / 'encoders').glob('*.npz'))


def stored(kind: str, name: str) -> tuple[pathlib.Path, np.ndarray, dict]:
  """(its directory, images, what was computed of them)."""
  path = GOLDEN / kind / name
  with np.load(f'{path}.npz') as file:
    arrays = dict(file)
  return path, arrays.pop('images'), arrays


def model(name: str) -> dict:
  """The model config of a stored tokenizer."""
  path, _, _ = stored('tokenizers', name)
  return json.loads((path / 'config.json').read_text())['model']


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


# -- names ---------------------------------------------------------------------
def recipe(name: str, arguments: str | None = None) -> Any:
  """The config of a file in `configs/`, with its `:arguments`."""
  return importlib.import_module(f'configs.{name}').get_config(arguments)


def resolved(config: Any) -> dict[str, Any]:
  """All that a config says, its defaults and names filled in."""
  spec = config_lib.read_config(config)
  tokenizer = vqrae_jax.build_tokenizer(spec.model)
  sections = _plain(spec)
  vit = tokenizer.encoder_spec.vit
  options = {option: getattr(vit, option) for option in specs.RUN_OPTIONS}
  sections['model'] = _plain(describe(tokenizer)) | options
  sections['losses'] = _plain(spec.terms())
  sections['schedules'] = {
    str(i): {'leaves': regex, 'schedule': _plain(row)}
    for i, (regex, row) in enumerate(spec.schedule_rows())
  }
  if (player := spec.discriminator) is not None:
    module = discriminators.build({'name': player.name, **player.fields})
    names = {f.name for f in dataclasses.fields(module)} - {'parent', 'name'}
    fields = {n: _plain(getattr(module, n)) for n in names}
    sections['discriminator']['fields'] = fields
  return sections


def command_flags() -> dict[str, dict[str, str | None]]:
  """{command: {flag: its default, None for none}}, by what --help prints."""
  found = {}
  for command, main in COMMANDS.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
      main(['--help'])
    found[command] = flags = {}
    rows = re.findall(r'^ +--(?:\[no\])?(\w+)\b(.*)$', out.getvalue(), re.M)
    for name, text in rows:
      default = re.search(r'\(default: (.*)\)$', text)
      flags[name] = default and default[1]
  return found


def config_keys() -> dict[str, Any]:
  """{dotted key of a config: its default, "required" without one}."""
  found: dict[str, Any] = {}
  for prefix, kind in _SECTIONS.items():
    _add_keys(found, kind, f'{prefix}.' if prefix else '')
  return found


def _add_keys(found: dict, kind: type, prefix: str) -> None:
  hints = typing.get_type_hints(kind)
  follows = ('parent', 'name', 'latent_dim') if 'parent' in hints else ()
  for field in dataclasses.fields(kind):
    if not field.init or field.name in follows:
      continue
    hint, name = hints[field.name], f'{prefix}{field.name}'
    inner = [
      k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)
    ]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    if inner:
      found |= {} if default is not None else {name: None}
      _add_keys(found, inner[0], f'{name}.')
    if dataclasses.is_dataclass(default):  # the section's own defaults
      found |= {f'{name}.{k}': v for k, v in _plain(default).items()}
    elif not inner:
      missing = default is dataclasses.MISSING
      found[name] = 'required' if missing else _plain(default)


def parameters(name: str) -> dict[str, inspect.Parameter]:
  """Of a public function; none of a class."""
  value = getattr(vqrae_jax, name)
  if isinstance(value, type):
    return {}
  return dict(inspect.signature(value).parameters)


# -- random weights ------------------------------------------------------------
DISCRIMINATORS = {
  'patch': dict(hidden=8, halvings=2, groups=4, pool=0),
  'dino': dict(
    vit=dict(width=16, depth=3, mlp_dim=24, num_heads=2, grid=(2, 2)),
    taps=(2, 0),
    kernel=3,
  ),
}


@functools.cache
def init_of(network: str) -> Callable[[jax.Array], Any]:
  """key -> a network's variables; jitted, so traced once."""
  kind, _, name = network.partition(' ')
  if kind == 'loss':
    return jax.jit(lambda key: networks.random(name, key))
  _, images, _ = stored('tokenizers', 'none')
  if kind == 'discriminator':
    module = discriminators.build(dict(name=name) | DISCRIMINATORS[name])
    images = jnp.float32(images[:1, :, :16]) / 255
  else:
    module = vqrae_jax.build_tokenizer(model(network))
  return jax.jit(lambda key: module.init(key, images))


def initial_weights(network: str, leaves: Iterable[str]) -> dict[str, Any]:
  """{leaf: array} of seed 0; of "run gan" as a run begins."""
  if network == 'run gan':
    config = RUNS['gan'](pathlib.Path()) | dict(init_from=None)
    made = setup.setup(config_lib.read_config(config))
    with jax.set_mesh(made.mesh):
      found = checkpoint.as_leaves(initialize.initialize(made).state)
    return {name: x for name, x in found.items() if x.size}

  @jax.jit  # compiles only what is asked for
  def drawn(key):
    variables = flat(init_of(network)(key))
    return {name: variables[name] for name in leaves}

  return drawn(jax.random.key(0))


def marks(leaf: Any) -> list[float]:
  """What tells a leaf's values from others: mean, RMS, first, last, and their
  product with a fixed vector, which another order changes."""
  x = np.asarray(leaf, np.float64).ravel()
  against = np.sin(np.arange(x.size) * 0.7 + 0.3) @ x / x.size**0.5
  return [x.mean(), np.sqrt(np.mean(x * x)), x[0], x[-1], against]


# -- samples -------------------------------------------------------------------
def _png(i: int) -> bytes:
  """An image of its own size for each i."""
  h, w = 18 + 3 * (i % 3), 17 + 5 * (i % 4)
  y, x, c = np.mgrid[:h, :w, :3]
  values = (x * 7 + y * 13 + c * 29 + i * 31) ** 2 % 251
  out = io.BytesIO()
  Image.fromarray(values.astype(np.uint8)).save(out, 'PNG')
  return out.getvalue()


def write_sources(root: pathlib.Path) -> dict[str, str]:
  """{kind: DATA} of sources with few images, and one with more than 4096,
  from which on another generator draws the order."""
  images = [_png(i) for i in range(5)]
  for i, data in enumerate(images):
    path = root / 'folder' / ('deep' if i % 2 else '') / f'image{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  for shard, rows in enumerate((images[:3], images[3:])):
    members = ((f'{shard}{i}.png', data) for i, data in enumerate(rows))
    makers.tar(root / f'shard-{shard}.tar', members)
    makers.array_record(root / f'records-{shard}.array_record', rows)
  many = ((f'{i:04d}.png', images[i % 5]) for i in range(4100))
  makers.tar(root / 'many.tar', many)
  return {
    'folder': str(root / 'folder'),
    'tar': str(root / 'shard-{0,1}.tar'),
    'array_record': str(root / 'records-*.array_record'),
    'many': str(root / 'many.tar'),
    'bundled:photos': 'bundled:photos',
  }


def samples(
  data: str, augment: dict, seed: int, hosts: int = 1
) -> list[list[str]]:
  """[image's name, SHA-256 of its crop] of the first 8, over all hosts."""
  source, every = sources.open_source(data), []
  for host in range(hosts):
    batches = pipeline.TrainBatches(
      source, [pipeline.Augment(**augment)], batch_size=4, seed=seed,
      process_index=host, process_count=hosts,
    ).iterate(0)  # fmt: skip
    every.append([next(batches), next(batches)])
  return [
    [source.name(photo), hashlib.sha256(image.tobytes()).hexdigest()]
    for step in zip(*every, strict=True)
    for batch in step
    for photo, image in zip(
      batch['photo'].tolist(), batch['images'], strict=True
    )
  ]


# -- runs ----------------------------------------------------------------------
STEPS = 20
_ADAM = dict(b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip=1.0)
_RATE = dict(lr=3e-3, end_lr=3e-4, warmup=3)
_CODES = dict(l2=1.0, commit=0.25, codebook=1.0)


def _stored(name: str) -> str:
  return str(GOLDEN / 'tokenizers' / name)


def _run(name: str, **keys: Any) -> dict:
  config = dict(
    model=model(name),
    data=dict(
      source='bundled:photos',
      include=('astronaut', 'chelsea', 'coffee'),  # PNG: one decoding
      image_size=16,
      resize=(16, 32),
    ),
    schedules=(('.*', _RATE),),
    optim=_ADAM,
    duration=STEPS,
    batch_size=8,
    ema=0.9,
    log=dict(every=1, images_every=0, usage_window=5, tensorboard=False),
    checkpoint=dict(every=STEPS, keep=1),
  )
  return config | keys


_PATCH = dict(
  name='patch', fields=DISCRIMINATORS['patch'], schedule=_RATE, optim=_ADAM
)
# {name: folder of the other runs -> config}. Chosen so that rounding cannot
# grow (`tests/golden/make_metrics.py` has the reasons): a large eps in Adam,
# tokens that are apart, reconstructions that are not flat, because weights
# come from the tokenizers stored here.
RUNS = {
  'plain': lambda at: _run(
    'simvq-l2',
    losses=_CODES,
    schedules=(('encoder/.*', None), ('.*', _RATE)),
    init=dict(encoder=_stored('simvq-l2')),
    eval=dict(source='bundled:photos', include=('coffee',), tile=64, every=10),
  ),
  'gan': lambda at: _run(
    'vq-ema',
    losses=dict(l2=1.0, commit=0.25, gan=dict(weight=0.5, start=4, ramp=3)),
    discriminator=_PATCH
    | dict(lecam=0.1, start='2 steps', schedule=_RATE | dict(lr=1e-3)),
    init_from=_stored('vq-ema'),
  ),
  'accumulation': lambda at: _run(
    'fsq-centered',
    losses=dict(l2=1.0, commit=0.25, gan=0.5),
    discriminator=_PATCH | dict(loss='non_saturating', r1=0.1, cutout=0.25),
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


def train(name: str, folder: pathlib.Path) -> None:
  """A whole run, its discriminator's fakes clipped but not rounded to 8 bits:
  a value between two levels falls to either by its last bit."""
  with mock.patch.object(
    adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0.0, 1.0)
  ):
    loop.train(RUNS[name](folder), folder / name)


def checkpoint_leaves(workdir: pathlib.Path) -> dict[str, str]:
  """{leaf name: "dtype [shape]"} of the last one, as its manifest has them."""
  path = workdir / 'checkpoints' / f'{STEPS:08d}' / '_CHECKPOINT_METADATA'
  leaves = json.loads(path.read_text())['custom_metadata']['leaves']
  return {name: f'{dtype} {shape}' for name, (shape, dtype) in leaves.items()}
