"""A folder of what a command may be pointed at by mistake."""

import io
import json
import pathlib
import re
import shutil
import struct
import sys
import zlib
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.data import makers
from tests.train import pieces
from vqrae_jax import cli, export, sharding
from vqrae_jax.train import loop

# A key made of a seed, an array laid on a device: single operations, and the
# first of a process compiles them.
SINGLE = {f'jit({n})' for n in (
  '_threefry_seed', 'broadcast_in_dim', 'copy', 'stage',
)}  # fmt: skip

FROZEN = (('encoder/embed/.*', None), ('.*', dict(lr=1e-3)))


def config():
  """Two steps on three images."""
  return tiny.run(
    model=tiny.model(depth=1),
    data=dict(source='photos', image_size=16),
    log=dict(every=1, images_every=0, usage_window=5, tensorboard=False),
    checkpoint=dict(every=1, keep=3),
    schedules=FROZEN,
    duration=2,
    ema=0.9,
    seed=0,
  )


def huge_png():
  """A header of 60,000 x 60,000 pixels, and next to no data."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

  header = struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'0')) + chunk(b'IEND', b'')
  )  # fmt: skip


def truncated_jpeg():
  out = io.BytesIO()
  Image.fromarray(makers.photo(0, 64, 64)).save(out, 'JPEG')
  return out.getvalue()[:-1500]


def flipped_png():
  data = bytearray(makers.png(5, 64, 64))
  data[len(data) // 2] ^= 0xFF
  return bytes(data)


BROKEN = {
  'zero.png': lambda: b'',
  'cut.jpg': truncated_jpeg,
  'words.jpg': lambda: b'not a photograph, whatever it is called\n' * 40,
  'huge.png': huge_png,
  'flipped.png': flipped_png,
  'nulls.webp': lambda: bytes(4096),
  'header.gif': lambda: b'GIF89a',
  'page.jpeg': lambda: b'<!DOCTYPE html><html>404</html>',
  'magic.tif': lambda: b'II*\0' + b'\xff' * 64,
  'vector.bmp': lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


def good(folder: pathlib.Path) -> list[str]:
  """Images of every mode that is converted, all below `folder`."""
  rgb = Image.fromarray(makers.photo(1, 24, 30))
  deep = np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 90
  exif = Image.Exif()
  exif[0x0112] = 6
  made = {
    'grey.png': (rgb.convert('L'), {}),
    'cmyk.jpg': (rgb.convert('CMYK'), {}),
    'sixteen.png': (Image.fromarray(deep), {}),
    'palette.png': (rgb.convert('P'), {}),
    'alpha.png': (rgb.convert('RGBA'), {}),
    'moving.gif': (rgb, dict(save_all=True, append_images=[rgb.rotate(90)])),
    'turned.jpg': (rgb, dict(exif=exif)),
    'plain.webp': (rgb, {}),
    'plain.tiff': (rgb, {}),
    'plain.bmp': (rgb, {}),
    'one bit.png': (rgb.convert('1'), {}),
    'wörds and spaces.JPG': (rgb, {}),
    'a png.jpeg': (rgb, dict(format='PNG')),
    'small.png': (rgb.resize((1, 1)), {}),
  }
  for name, (image, options) in made.items():
    image.save(folder / name, **options)
  for i in range(8):
    (folder / f'{i}.png').write_bytes(makers.png(i))
  return [*made, *range(8)]


def _tokenizers(root, good):
  def copy(name, file, change):
    shutil.copytree(good, root / name)
    path = root / name / file
    path.write_bytes(change(path.read_bytes()))

  def edited(name, **keys):
    copy(
      name, export.CONFIG, lambda b: json.dumps(json.loads(b) | keys).encode()
    )

  for name, file in (
    ('no-config', export.CONFIG), ('no-weights', export.WEIGHTS),
  ):  # fmt: skip
    copy(name, file, bytes)
    (root / name / file).unlink()
  for name, data in (
    ('empty', b''), ('list', b'[1, 2]'), ('binary', b'\xff\xfe\0\x80'),
  ):  # fmt: skip
    copy(f'{name}-config', export.CONFIG, lambda _, data=data: data)
  edited('no-model', model=3)
  edited('odd-model', model={'encodr': {}})
  edited('newer', format_version=9)
  edited('encoder', encoder={})
  edited('edited', fingerprint=64 * '0')
  edited('another-model', model=tiny.model('vq-ema'))
  vit = tiny.VIT | dict(norm_eps=float('nan'))
  edited('nan', model=tiny.model() | dict(encoder=dict(vit=vit)))
  copy('cut-weights', export.WEIGHTS, lambda b: b[:-500])
  copy('noise-weights', export.WEIGHTS, lambda _: b'\x07' * 999)
  copy('empty-weights', export.WEIGHTS, lambda _: b'')


def _runs(root):
  run = root / 'run'
  data = dict(source=str(root / 'photos'), image_size=16)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  with mock.patch.object(sharding, 'make_mesh', lambda *_, **__: one):
    loop.train(config() | dict(data=data), run)
  shutil.copytree(run / 'tokenizer', root / 'tokenizer')
  for name in ('torn', 'another', 'headless', 'unbegun', 'blocked'):
    shutil.copytree(run, root / name)
  for path in (root / 'torn' / 'checkpoints').glob('0*/**/*'):
    if path.is_file():
      path.write_bytes(b'')

  pieces.edit_manifests(
    root / 'another', lambda m: m['frozen']['params'].update(sha256='0')
  )
  (root / 'headless' / 'config.json').unlink()
  shutil.rmtree(root / 'unbegun' / 'checkpoints')
  (root / 'unbegun' / 'checkpoints').mkdir()
  shutil.rmtree(root / 'blocked' / 'checkpoints')
  (root / 'blocked' / 'checkpoints').write_text('a file')
  (root / 'foreign' / 'tokenizer').mkdir(parents=True)
  (root / 'foreign' / 'tokenizer' / 'tokenizer.json').write_text('{}')
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema')), root / 'other')


def make(root: pathlib.Path) -> pathlib.Path:
  """Fills `root`; returns it."""
  for folder in ('photos', 'hollow', 'bad', 'tok'):
    (root / folder).mkdir(parents=True)
  for i in range(3):
    (root / 'photos' / f'{i}.png').write_bytes(makers.png(i))
  (root / 'notes.txt').write_text('words\n')
  (root / 'dot.png').write_bytes(makers.png(0, 3, 3))
  for name, data in BROKEN.items():
    (root / 'bad' / name).write_bytes(data())
  makers.tar(root / 'bad.tar', [(n, data()) for n, data in BROKEN.items()])
  foreign = [b'a pickle, or what else', makers.example(label=3)]
  makers.array_record(root / 'foreign.array_record', foreign)
  (root / 'mine.py').write_text(
    'import ml_collections\n'
    f'def get_config(keys=""):\n'
    f'  over = eval(f"dict({{keys}})")\n'
    f'  return ml_collections.ConfigDict({config()!r} | over)\n'
  )
  (root / 'broken.py').write_text('def get_config(:\n')
  (root / 'fails.py').write_text('def get_config():\n  return 1 / 0\n')
  (root / 'none.py').write_text('config = {}\n')
  for name, value in (('list', '[1]'), ('value', "int('abc')")):
    text = f'def get_config():\n  return {value}\n'
    (root / f'{name}.py').write_text(text)
  _runs(root)
  _tokenizers(root / 'tok', root / 'tokenizer')
  return root


def answer(place, monkeypatch, capsys, main, argv: list[str]) -> str:
  """The error line of a command that must fail cleanly, and write nothing."""
  monkeypatch.chdir(place)
  monkeypatch.setattr(sys, 'argv', ['', *argv])
  before = {p: p.lstat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  err = capsys.readouterr().err
  *others, last = err.splitlines()
  assert stop.value.code == 2
  assert last.startswith('error: ') and err.endswith('\n')
  assert all(re.match(r'[IW]\d{4} ', line) for line in others), err
  after = {p: p.lstat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
  assert after == before
  return last
