"""Files from a web server on this machine: cut, changed, refused, moved."""

import hashlib
import http.server
import os
import re
import stat
import threading

import numpy as np
import pytest

from vqrae_jax import fetch_weights
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import networks
from vqrae_jax.weights import hub

DATA = np.random.default_rng(0).bytes(3 << 20)
HASH = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_GET(self):
    site = self.server
    site.asked.append(self.path)
    if self.path == '/moved':
      self.send_response(302)
      self.send_header('Location', '/file.pth')
      self.end_headers()
      return
    if self.path != '/file.pth':
      self.send_error(404)
      return
    self.send_response(200)
    if site.names_size:
      self.send_header('Content-Length', str(len(site.data)))
    self.end_headers()
    self.wfile.write(site.data[: site.cut])


@pytest.fixture
def site():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.data, server.cut, server.names_size = DATA, None, True
  server.asked = []
  server.url = f'http://127.0.0.1:{server.server_address[1]}/file.pth'
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'weights' / 'file.pth'


def names(path):
  if not path.parent.exists():
    return []
  return sorted(p.name for p in path.parent.iterdir())


def refused(*args):
  with pytest.raises(UserError) as caught:
    hub.download(*args)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 600
  return message


@pytest.mark.parametrize('known', (HASH, None))
def test_a_file_comes_complete_and_its_hash_stays_beside_it(
  site, path, known, caplog
):
  moved = site.url.replace('file.pth', 'moved')  # redirects are followed
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
  assert site.asked == ['/moved', '/file.pth']
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
  with pytest.raises(UserError, match='fetch_weights --names=vgg16'):
    hub.locate('vgg16')
  fetch_weights.main(['--names=vgg16'])
  assert HASH in capsys.readouterr().out
  assert hub.locate('vgg16') == row.path
  os.truncate(row.path, 100)
  with pytest.raises(UserError, match='fetch_weights --names=vgg16'):
    hub.locate('vgg16')


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
  with pytest.raises(UserError, match='fetch_weights --names=dino-s8'):
    hub.locate('dino-s8')


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
  assert 'abc' in capsys.readouterr().out
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
  teachers = {'init': [], 'vit-mae-base': [], 'dinov2-base': ['dinov2-base']}
  for teacher, more in teachers.items():
    want = ['vit-mae-base', *more, *lpips]
    assert needed(patch | dict(teacher=teacher)) == want
  blind = config | dict(init=dict(networks='random'))
  assert needed(blind) == ['vit-mae-base']
  assert needed(blind | dict(eval=dict(rfid=True))) == [
    'vit-mae-base', 'inception',
  ]  # fmt: skip
  init = dict(encoder='hf:me/mine')
  assert needed(dict(model=model, init=init)) == ['hf:me/mine']
  assert needed(dict(model=model, init=dict(encoder='/a/path'))) == []


def test_needs_are_what_the_losses_open():
  for term, parts in networks.PARTS.items():
    assert hub.NEEDS[term] == tuple(row for row, _ in parts.values())


def test_the_hub_out_of_reach(monkeypatch):
  """Its own message, which is long, ends between two words of it."""
  import huggingface_hub

  words = [f'word{n}' for n in range(100)]

  def fails(*args, **kwargs):
    raise OSError('\n'.join(words))

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fails)
  with pytest.raises(UserError, match='hf download facebook/vit-mae-b') as e:
    fetch_weights.main(['--names=vit-mae-base'])
  quoted = str(e.value).split('OSError: ')[1].split(' …')[0].split(' ')
  assert 5 < len(quoted) < 50 and quoted == words[: len(quoted)]


def test_the_table(capsys):
  fetch_weights.main(['--list'])
  words = capsys.readouterr().out.split()
  assert {'siglip-large-patch16-384', *hub.FILES} <= {*words}
  for rows in hub.NEEDS.values():
    assert set(rows) <= set(hub.FILES)
  for row in hub.FILES.values():
    assert row.licence and row.url.startswith('https://')
    # PyTorch's files bear eight digits of it in their names.
    digits = re.search(r'-([0-9a-f]{8})\.\w+$', row.file)
    assert digits is None or row.sha256.startswith(digits[1])
  with pytest.raises(UserError, match='did you mean "vgg16"'):
    fetch_weights.main(['--names=vgg15'])
  with pytest.raises(UserError, match='--config, --names or --list'):
    fetch_weights.main([])
