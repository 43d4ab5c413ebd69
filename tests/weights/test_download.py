"""Files from a web server on this machine: cut, changed, refused, moved."""

import hashlib
import http.server
import os
import re
import stat
import threading
from unittest import mock

import huggingface_hub
import numpy as np
import pytest

from tests.weights.files import error_of
from vqrae_jax import fetch_weights
from vqrae_jax.pretrained import networks
from vqrae_jax.weights import hub

DATA = np.random.default_rng(0).bytes(3 << 20)
HASH = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    site = self.server
    site.asked.append(self.path)
    codes = {'/file.pth': 200, '/moved.pth': 302}
    self.send_response(codes.get(self.path, 404))
    if self.path == '/moved.pth':
      self.send_header('Location', '/file.pth')
    elif site.names_size:
      self.send_header('Content-Length', str(len(site.data)))
    self.end_headers()
    if self.path == '/file.pth':
      self.wfile.write(site.data[: site.cut])


@pytest.fixture
def site():
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.data, server.cut, server.names_size = DATA, None, True
    server.asked = []
    server.url = f'http://127.0.0.1:{server.server_address[1]}/file.pth'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'weights' / 'file.pth'


def names(path):
  return sorted(p.name for p in path.parent.glob('*'))


def refused(*args):
  return error_of(hub.download, *args)


@pytest.mark.parametrize('known', (HASH, None))
def test_a_file_comes_complete_and_its_hash_stays_beside_it(
  site, path, known, caplog
):
  moved = site.url.replace('file', 'moved')  # redirects are followed
  assert hub.download(moved, path, known)
  assert path.read_bytes() == DATA
  assert names(path) == ['file.pth', 'file.pth.sha256']
  record = hub.record(path).read_text()
  assert record.startswith(f'{HASH}  file.pth\n') and str(len(DATA)) in record
  # Who may read other files of ours may read it.
  modes = {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
  assert len(modes) == 1
  # A hash that nobody publishes is logged, once.
  assert caplog.text.count(HASH) == (known is None)
  assert site.asked == ['/moved.pth', '/file.pth']
  assert not hub.download(moved, path, known)
  assert len(site.asked) == 2 and caplog.text.count(HASH) == (known is None)


@pytest.mark.parametrize('names_size', (True, False))
@pytest.mark.parametrize('known', (HASH, None))
def test_a_cut_answer_is_never_a_file(site, path, known, names_size):
  site.cut, site.names_size = 1 << 20, names_size
  assert site.url in refused(site.url, path, known)
  assert names(path) == []
  # Neither is a part that an earlier version or another program left.
  path.parent.mkdir(exist_ok=True)
  path.with_name('file.pth.part').write_bytes(b'x' * 1000)
  site.cut, site.names_size = None, True
  assert hub.download(site.url, path, known)
  assert path.read_bytes() == DATA


def test_another_file_than_the_table_means_is_refused(site, path):
  assert 'f' * 64 in refused(site.url, path, 'f' * 64)
  assert names(path) == []


def test_without_a_known_hash_the_first_one_is_held(site, path):
  assert hub.download(site.url, path)
  path.write_bytes(b'y' + DATA[1:])
  assert hub.download(site.url, path)  # damaged: downloaded again
  assert path.read_bytes() == DATA
  site.data = b'another'
  path.write_bytes(b'damaged again')
  assert HASH in refused(site.url, path)
  assert path.read_bytes() == b'damaged again'


def test_no_way_to_it_names_the_url_and_the_place(site, path, tmp_path):
  none = site.url.replace('file', 'none')
  message = refused(none, path)
  assert none in message and '404' in message and str(path) in message
  (tmp_path / 'taken').write_text('a file')
  inside = tmp_path / 'taken' / 'w' / 'file.pth'
  assert 'VQRAE_JAX_CACHE' in refused(site.url, inside)
  site.shutdown()
  site.server_close()
  assert str(path) in refused(site.url, path)


@pytest.fixture
def row(site, monkeypatch, tmp_path):
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path / 'cache'))
  made = hub.PublishedFile(site.url, 'none', 'a test', HASH)
  monkeypatch.setitem(hub.FILES, 'vgg16', made)
  return made


def test_a_missing_file_says_the_command_that_brings_it(row, capsys):
  command = 'fetch_weights --names=vgg16'
  assert command in error_of(hub.locate, 'vgg16')
  fetch_weights.main(['--names=vgg16'])
  assert HASH in capsys.readouterr().out
  assert hub.locate('vgg16') == row.path
  os.truncate(row.path, 100)
  assert command in error_of(hub.locate, 'vgg16')


def test_a_file_put_there_by_hand_is_recorded_at_first_use(
  row, monkeypatch, caplog
):
  unknown = hub.PublishedFile(row.url, 'none', 'a test')
  monkeypatch.setitem(hub.FILES, 'dino-s8', unknown)
  unknown.path.parent.mkdir(parents=True)
  unknown.path.write_bytes(DATA)
  for _ in range(2):
    assert hub.locate('dino-s8') == unknown.path
  assert caplog.text.count(HASH) == 1
  unknown.path.write_bytes(DATA[1:])
  assert 'fetch_weights --names=dino-s8' in error_of(hub.locate, 'dino-s8')


def test_a_config_says_what_it_needs(monkeypatch, tmp_path, row, capsys):
  (tmp_path / 'model.safetensors').write_bytes(bytes(1 << 20))
  asked, files = mock.Mock(return_value=str(tmp_path)), []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', asked)
  monkeypatch.setattr(fetch_weights, '_file', files.append)
  fetch_weights.main(['--config=configs/simvq_siglip2_l.py:preset=paper'])
  asked.assert_called_once_with(
    'google/siglip2-large-patch16-256', revision=None, allow_patterns=mock.ANY
  )
  assert not {'*.py', '*'} & {*asked.call_args.kwargs['allow_patterns']}
  assert sorted(files) == ['convnext-small', 'lpips-vgg', 'vgg16']
  assert tmp_path.name in capsys.readouterr().out
  fetch_weights.main(['--config=configs/quickstart.py'])
  assert 'needs no published weights' in capsys.readouterr().out
  fetch_weights.main(['--names=hf:me/mine@v2'])
  asked.assert_called_with('me/mine', revision='v2', allow_patterns=mock.ANY)


MAE, LPIPS = 'vit-mae-base', ('vgg16', 'lpips-vgg')
RANDOM, RFID = dict(networks='random'), dict(metrics=('rfid',))


@pytest.mark.parametrize(
  ('keys', 'want'),
  [
    ({}, [MAE, *LPIPS, 'dino-s8']),
    (dict(discriminator=dict(name='patch')), [MAE, *LPIPS]),
    (dict(init=RANDOM), [MAE]),
    (dict(eval=RFID), [MAE, *LPIPS, 'dino-s8', 'inception']),
    (dict(init=RANDOM, eval=RFID), [MAE]),
    (dict(init=RANDOM, teacher='dinov2-base'), [MAE, 'dinov2-base']),
    # Neither the teacher of its own start nor one named twice is another file.
    (dict(init=RANDOM, teacher='init'), [MAE]),
    (dict(init=RANDOM, teacher=MAE), [MAE]),
    (dict(init=RANDOM | dict(encoder='hf:me/mine')), ['hf:me/mine']),
    (dict(init=RANDOM | dict(encoder='/a/path')), []),
  ],
)
def test_needs_of_losses_and_of_encoders_given_elsewhere(keys, want):
  config = dict(
    model=dict(encoder=dict(name=MAE)),
    losses=dict(l2=1.0, lpips=1.0, convnext=0.0, gan=dict(weight=0.75)),
    discriminator=dict(name='dino'),
  )
  assert fetch_weights.needed(config | keys) == want


def test_the_hub_out_of_reach(monkeypatch):
  """Its own message, which is long, ends between two words of it."""
  words = [f'word{n}' for n in range(100)]
  fails = mock.Mock(side_effect=OSError('\n'.join(words)))
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fails)
  message = error_of(fetch_weights.main, ['--names=vit-mae-base'])
  assert 'hf download facebook/vit-mae-base' in message
  quoted = message.split('OSError: ')[1].split(' …')[0].split(' ')
  assert 5 < len(quoted) < 50 and quoted == words[: len(quoted)]


def test_the_table(capsys):
  fetch_weights.main(['--list'])
  words = capsys.readouterr().out.split()
  assert {'siglip-large-patch16-384', *hub.FILES} <= {*words}
  for rows in networks.NEEDS.values():
    assert set(rows) <= set(hub.FILES)
  for row in hub.FILES.values():
    assert row.licence and row.url.startswith('https://')
    # PyTorch's files bear eight digits of it in their names.
    digits = re.search(r'-([0-9a-f]{8})\.\w+$', row.file)
    assert digits is None or row.sha256.startswith(digits[1])
  asked = error_of(fetch_weights.main, ['--names=vgg15'])
  assert 'did you mean "vgg16"' in asked
  assert '--config, --names or --list' in error_of(fetch_weights.main, [])
