"""Files from a web server on this machine: cut, changed, refused, moved."""

import fcntl
import hashlib
import http.server
import importlib
import os
import threading

import numpy as np
import pytest

from vqrae_jax import fetch_weights
from vqrae_jax.errors import UserError
from vqrae_jax.weights import hub
from vqrae_jax.weights import hub as download_lib
from vqrae_jax.weights import hub as published

download = download_lib.download
DATA = np.random.default_rng(0).bytes(3 << 20)
HASH = hashlib.sha256(DATA).hexdigest()

LPIPS = ('vgg16', 'lpips-vgg')
BOTH = (*LPIPS, 'convnext-small')
DINO = (*LPIPS, 'dino-s8')


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_GET(self):
    site = self.server
    site.asked.append((self.path, self.headers.get('Range')))
    if self.path == '/moved':
      self.send_response(302)
      self.send_header('Location', '/file.pth')
      self.end_headers()
      return
    if self.path != '/file.pth':
      self.send_error(404)
      return
    start = 0
    given = self.headers.get('Range')
    if given and site.ranges and self.headers.get('If-Range') == site.etag:
      start = int(given.removeprefix('bytes=').rstrip('-'))
      self.send_response(206)
      span = f'bytes {start}-{len(site.data) - 1}/{len(site.data)}'
      self.send_header('Content-Range', span)
    else:
      self.send_response(200)
    self.send_header('ETag', site.etag)
    self.send_header('Content-Length', str(len(site.data) - start))
    self.end_headers()
    stop = site.cuts.pop(0) if site.cuts else len(site.data)
    self.wfile.write(site.data[start:stop])


@pytest.fixture
def site():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.data, server.etag, server.ranges = DATA, '"one"', True
  server.cuts, server.asked = [], []
  server.root = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'weights' / 'file.pth'


def names(path):
  return sorted(p.name for p in path.parent.iterdir())


def test_a_file_comes_whole_and_its_hash_stays_beside_it(site, path):
  seen = []
  assert download(
    f'{site.root}/file.pth', path, HASH, lambda *a: seen.append(a)
  )
  assert path.read_bytes() == DATA
  assert names(path) == ['file.pth', 'file.pth.sha256']
  assert published.record(path).read_text() == f'{HASH}  file.pth\n'
  assert seen[-1] == (len(DATA), len(DATA))
  # There and whole: the server is not asked again.
  assert not download(f'{site.root}/file.pth', path, HASH)
  assert len(site.asked) == 1


def test_a_cut_goes_on_within_a_run_and_in_the_next(site, path):
  site.cuts = [1 << 20, 2 << 20]
  assert download(f'{site.root}/file.pth', path, HASH)
  ranges = [r for _, r in site.asked]
  assert ranges == [None, f'bytes={1 << 20}-', f'bytes={2 << 20}-']
  path.unlink()
  published.record(path).unlink()
  site.cuts = [1000, 2000, 3000]
  with pytest.raises(UserError, match='cut after 3000 of 3145728 bytes; run'):
    download(f'{site.root}/file.pth', path, HASH)
  assert names(path) == ['file.pth.part', 'file.pth.part.tag']
  assert download(f'{site.root}/file.pth', path, HASH)
  assert site.asked[-1][1] == 'bytes=3000-'
  assert path.read_bytes() == DATA and len(names(path)) == 2


@pytest.mark.parametrize('how', ('no ranges', 'changed', 'spoilt part'))
def test_what_cannot_go_on_starts_over(site, path, how):
  path.parent.mkdir()
  part = path.with_name('file.pth.part')
  part.write_bytes(b'x' * 1000)
  part.with_name('file.pth.part.tag').write_text(site.etag)
  site.ranges = how != 'no ranges'
  site.etag = '"two"' if how == 'changed' else site.etag
  assert download(f'{site.root}/file.pth', path, HASH)
  assert path.read_bytes() == DATA
  assert len(site.asked) == (2 if how == 'spoilt part' else 1)


def test_another_file_than_the_table_means_is_refused(site, path):
  with pytest.raises(UserError, match='another file than the table means'):
    download(f'{site.root}/file.pth', path, 'f' * 64)
  assert names(path) == []


def test_eight_digits_in_the_name_are_checked(site, path):
  right = path.with_name(f'net-{HASH[:8]}.pth')
  assert download(f'{site.root}/file.pth', right)
  wrong = path.with_name('net-00000000.pth')
  with pytest.raises(UserError, match='00000000 is wanted'):
    download(f'{site.root}/file.pth', wrong)
  assert not wrong.exists()


def test_without_a_known_hash_the_first_one_is_held(site, path):
  assert download(f'{site.root}/file.pth', path)
  path.write_bytes(b'y' + DATA[1:])
  assert download(f'{site.root}/file.pth', path)  # damaged: anew
  assert path.read_bytes() == DATA
  site.data = b'another'
  path.write_bytes(b'damaged again')
  with pytest.raises(UserError, match='another file'):
    download(f'{site.root}/file.pth', path)
  assert path.read_bytes() == b'damaged again'


def test_redirects_are_followed(site, path):
  assert download(f'{site.root}/moved', path, HASH)
  assert path.read_bytes() == DATA


def test_no_way_to_it_names_the_url_and_the_place(site, path):
  with pytest.raises(UserError, match=r'/none cannot be had \(404') as e:
    download(f'{site.root}/none', path)
  assert f'put it at {path}' in str(e.value) and '\n' not in str(e.value)
  site.shutdown()
  site.server_close()
  with pytest.raises(UserError, match='cannot be had .*refused') as e:
    download(f'{site.root}/file.pth', path)
  assert f'put it at {path}' in str(e.value)


def test_a_cache_that_cannot_be_written(site, tmp_path):
  (tmp_path / 'taken').write_text('a file')
  with pytest.raises(UserError, match='set VQRAE_JAX_CACHE'):
    download(f'{site.root}/file.pth', tmp_path / 'taken' / 'w' / 'file.pth')


def test_two_processes_do_not_write_one_part(site, path):
  path.parent.mkdir()
  with path.with_name('file.pth.part.lock').open('w') as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another process'):
      download(f'{site.root}/file.pth', path)


@pytest.fixture
def row(site, monkeypatch, tmp_path):
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path / 'cache'))
  made = published.PublishedFile(
    f'{site.root}/file.pth', 'none', 'a test', HASH
  )
  monkeypatch.setitem(published.FILES, 'vgg16', made)
  return made


def test_a_missing_file_says_the_command_that_brings_it(row, capsys):
  with pytest.raises(UserError, match='fetch_weights --names=vgg16'):
    published.locate('vgg16')
  fetch_weights.main(['--names=vgg16'])
  assert f'SHA-256 {HASH} (as published)' in capsys.readouterr().out
  assert published.locate('vgg16') == row.path
  assert row.path.parent.parent == row.path.parents[1]
  os.truncate(row.path, 100)
  with pytest.raises(UserError, match='damaged or another file; bring it anew'):
    published.locate('vgg16')


def test_a_config_says_what_it_needs(monkeypatch, tmp_path, row, capsys):
  asked = []

  def snapshot_download(repo, *, revision, allow_patterns):
    asked.append((repo, revision, allow_patterns))
    (tmp_path / 'abc').mkdir(exist_ok=True)
    (tmp_path / 'abc' / 'model.safetensors').write_bytes(bytes(1 << 20))
    return str(tmp_path / 'abc')

  import huggingface_hub

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  files = []
  monkeypatch.setattr(fetch_weights, '_file', files.append)
  fetch_weights.main(['--config=configs/simvq_siglip2_l.py:preset=paper'])
  assert [a[:2] for a in asked] == [('google/siglip2-large-patch16-256', None)]
  assert sorted(files) == ['convnext-small', 'lpips-vgg', 'vgg16']
  assert 'commit abc, 1 MiB' in capsys.readouterr().out
  assert not {'*.py', '*'} & set(asked[0][2])
  fetch_weights.main(['--config=configs/quickstart.py'])
  assert 'needs no published weights' in capsys.readouterr().out
  fetch_weights.main(['--names=hf:me/mine@v2'])
  assert asked[-1][:2] == ('me/mine', 'v2')


def test_needs_of_losses_and_of_encoders_given_elsewhere():
  needed = fetch_weights.needed
  losses = dict(l2=1.0, lpips=1.0, convnext=0.0, gan=dict(weight=0.75))
  model = dict(encoder=dict(name='vit-mae-base'))
  config = dict(model=model, losses=losses, discriminator=dict(name='dino'))
  lpips = ['vgg16', 'lpips-vgg']
  assert needed(config) == ['vit-mae-base', *lpips, 'dino-s8']
  patch = config | dict(discriminator=dict(name='patch'))
  assert needed(patch) == ['vit-mae-base', *lpips]
  # Neither the teacher of its own start nor one named twice is another file.
  for teacher in ('init', 'vit-mae-base', None):
    assert needed(patch | dict(teacher=teacher)) == needed(patch)
  taught = patch | dict(teacher='dinov2-base')
  assert needed(taught) == ['vit-mae-base', 'dinov2-base', *lpips]
  blind = config | dict(init=dict(networks='random'))
  assert needed(blind) == ['vit-mae-base']
  assert needed(blind | dict(eval=dict(rfid=True))) == [
    'vit-mae-base', 'inception',
  ]  # fmt: skip
  init = dict(encoder='hf:me/mine')
  assert needed(dict(model=model, init=init)) == ['hf:me/mine']
  assert needed(dict(model=model, init=dict(encoder='/a/path'))) == []


@pytest.mark.parametrize(
  'name, encoder, files',
  [
    ('simvq_siglip_l', 'siglip-large-patch16-384', DINO),
    ('simvq_siglip_l:stage=2', 'siglip-large-patch16-384', LPIPS),
    ('simvq_siglip2_l', 'siglip2-large-patch16-256', DINO),
    ('simvq_siglip2_l:stage=2', 'siglip2-large-patch16-256', LPIPS),
    ('simvq_siglip2_l:preset=paper', 'siglip2-large-patch16-256', BOTH),
    ('simvq_siglip2_l:preset=paper,stage=2', 'siglip2-large-patch16-256', BOTH),
    ('vq_dinov2_b', 'dinov2-with-registers-base', DINO),
    ('vq_dinov2_b_decxl', 'dinov2-with-registers-base', DINO),
    ('rae_dinov2_b', 'dinov2-with-registers-base', DINO),
    ('vqvae_16k', 'siglip-large-patch16-384', DINO),
    ('fsq_siglip_l', 'siglip-large-patch16-384', DINO),
    ('fsq_cosmos_64k', 'siglip2-base-patch16-256', DINO),
    ('internvit_6b', 'internvit-6b-448px-v2_5', BOTH),
    ('internvit_6b:stage=2', 'internvit-6b-448px-v2_5', BOTH),
    ('paper_siglip2_so400m', 'siglip2-so400m-patch16-256', BOTH),
    ('paper_siglip2_so400m:stage=2', 'siglip2-so400m-patch16-256', BOTH),
    ('paper_internvit_300m', 'internvit-300m-448px-v2_5', BOTH),
    ('paper_internvit_300m:stage=2', 'internvit-300m-448px-v2_5', BOTH),
    ('finetune_decoder', 'siglip-large-patch16-384', DINO),
  ],
)
def test_what_each_recipe_needs(name, encoder, files):
  """All that a run of it opens: none of it is met only after hours."""
  name, _, arguments = name.partition(':')
  recipe = importlib.import_module(f'configs.{name}')
  config = recipe.get_config(arguments or None)
  first, *others = fetch_weights.needed(config)
  assert first == encoder and sorted(others) == sorted(files)


def test_the_hub_out_of_reach(monkeypatch):
  import huggingface_hub

  def fails(*args, **kwargs):
    raise OSError('no network')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fails)
  with pytest.raises(UserError, match='google/vit|facebook/vit-mae-base'):
    fetch_weights.main(['--names=vit-mae-base'])
  assert hub.fetch_command('a/b', None).startswith('hf download a/b')


def test_the_table(capsys):
  fetch_weights.main(['--list'])
  lines = capsys.readouterr().out.splitlines()
  for name in ('siglip-large-patch16-384', *published.FILES):
    assert any(line.startswith(f'{name} ') for line in lines)
  for rows in published.NEEDS.values():
    assert set(rows) <= set(published.FILES)
  for row in published.FILES.values():
    assert row.licence and row.url.startswith('https://')
    digits = published.wanted(row.path.with_name(row.file), None)
    assert (row.sha256 or '').startswith(digits)
  with pytest.raises(UserError, match='did you mean "vgg16"'):
    fetch_weights.main(['--names=vgg15'])
  with pytest.raises(UserError, match='--config, --names or --list'):
    fetch_weights.main([])
