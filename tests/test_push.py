"""Tokenizers to the hub and back, over a stand-in of it on this machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import vqrae_jax
from tests import hub, tiny
from vqrae_jax import export, push
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPO = 'someone/tiny'
# As users name another hub: before its client is imported.
BY_ENVIRONMENT = """
import sys
from vqrae_jax import export, push
tokenizer, repo, again = sys.argv[1:]
push.main([f'--tokenizer={tokenizer}', f'--repo={repo}', '--private'])
export.save_tokenizer(*export.load_tokenizer(f'hf:{repo}'), again)
"""


@pytest.fixture
def site(monkeypatch, tmp_path):
  """The stand-in, which this process and its children take for the hub."""
  from huggingface_hub import constants

  with hub.serving() as server:
    own = dict(
      HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'home'),
      HF_HUB_DISABLE_XET='1', HF_TOKEN='hf_owner',
    )  # fmt: skip
    for name, value in own.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    files = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', files)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    yield server


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'tokenizer'
  export.save_tokenizer(*tiny.built(tiny.model('simvq-cosine')), folder)
  return folder


def fingerprint(folder):
  return json.loads((folder / export.CONFIG).read_text())['fingerprint']


def opened(source):
  return trees.flatten(vqrae_jax.load_tokenizer(source)[1])


def test_push_and_pull_by_the_environment(site, saved, tmp_path):
  again = tmp_path / 'again'
  subprocess.run(
    [sys.executable, '-c', BY_ENVIRONMENT, saved, REPO, again],
    check=True, cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)},
  )  # fmt: skip
  for name in (export.CONFIG, export.WEIGHTS):
    assert (again / name).read_bytes() == (saved / name).read_bytes()
  (*_, files) = site.repos[REPO].values()
  assert files.keys() == {
    '.gitattributes', 'README.md', export.CONFIG, export.WEIGHTS,
  }  # fmt: skip
  assert site.private[REPO]
  text = files['README.md'].decode()
  assert f'hf:{REPO}' in text and fingerprint(saved) in text


def test_revisions_and_the_cache(site, saved, tmp_path, monkeypatch):
  """Each revision has its own values; what was downloaded once is enough."""
  from huggingface_hub import constants

  other = tmp_path / 'other'
  export.save_tokenizer(*tiny.built(tiny.model('fsq-cosmos')), other)
  for folder in (saved, other):
    push.main([f'--tokenizer={folder}', f'--repo={REPO}'])
  _, first, _ = site.repos[REPO]
  by_name, by_commit = f'hf:{REPO}', f'hf:{REPO}@{first}'
  want = opened(other).keys(), opened(saved).keys()
  assert (opened(by_name).keys(), opened(by_commit).keys()) == want
  # The two files of a tokenizer, and no other.
  got = {a.rpartition('/')[2] for a in site.asked if '/resolve/' in a}
  assert got == {export.CONFIG, export.WEIGHTS}
  asked = len(site.asked)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  assert (opened(by_name).keys(), opened(by_commit).keys()) == want
  assert len(site.asked) == asked
  with pytest.raises(UserError, match='hf:someone/else.*hf download'):
    opened('hf:someone/else')


def refused(words, fn, *args):
  with pytest.raises(UserError, match=words) as error:
    fn(*args)
  assert '\n' not in str(error.value)


def test_what_is_not_there(site, saved, tmp_path, monkeypatch):
  pickled = {'pytorch_model.bin': b'a pickle', 'code.py': b'raise SystemExit'}
  site.repos['someone/torch'] = {'1' * 40: pickled}
  config = (saved / export.CONFIG).read_bytes()
  site.repos['someone/half'] = {'2' * 40: {export.CONFIG: config}}
  cut = (saved / export.WEIGHTS).read_bytes()[:-90]
  files = {export.CONFIG: config, export.WEIGHTS: cut}
  site.repos['someone/cut'] = {'3' * 40: files}
  refused('hf:no/body.*NotFound', opened, 'hf:no/body')
  refused('hf:someone/half@v9.*Revision', opened, 'hf:someone/half@v9')
  refused('hf:someone/torch: ', opened, 'hf:someone/torch')
  refused('hf:someone/half: .*model.safetensors', opened, 'hf:someone/half')
  refused('hf:someone/cut: .*model.safetensors', opened, 'hf:someone/cut')
  refused('hf:ORG/NAME', opened, 'hf:someone')
  assert not any('pytorch_model' in a or 'code.py' in a for a in site.asked)
  argv = [f'--tokenizer={saved}', f'--repo={REPO}']
  monkeypatch.setenv('HF_TOKEN', 'hf_guest')
  refused(f'hf:{REPO}.*hf auth login', push.main, argv)
  assert REPO not in site.repos
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  refused('network.*HF_ENDPOINT', push.main, argv)


@pytest.mark.parametrize(
  'init, words',
  [
    (dict(), ['random weights']),
    (dict(encoder='dinov2-base'), ['facebook/dinov2-base', 'Apache-2.0']),
    (dict(decoder='rae:decoders/model.pt'), ['decoders/model.pt', 'licence']),
    (
      dict(encoder='dinov2-base', decoder='rae:model.pt'),
      ['facebook/dinov2-base', 'model.pt'],
    ),
  ],
)
def test_the_card_names_where_weights_come_from(init, words):
  """Encoder and decoder; only a run that loaded neither is all its own."""
  tokenizer, _ = tiny.built(tiny.model('simvq-cosine'))
  config = config_lib.read_config(tiny.run('simvq-cosine', init=init))
  figures = dict(steps=2, psnr=20.0)
  text = push.card(REPO, tokenizer, 1, 'f', (config, figures))
  licence = text.partition('## Licence')[2]
  assert all(word in licence for word in words), licence
  assert ('random weights' in licence) == (not init)
