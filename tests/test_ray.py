"""examples/ray_tokenize.py on a real local cluster, with an actor killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import pytest

from tests import runs, tiny
from tests.data import makers
from vqrae_jax import export

pytestmark = pytest.mark.slow
IMAGES, EACH = 160, 4


def actors(mark: str) -> list[int]:
  """Processes of Ray Data's actors that were started with MARK=`mark`."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      ours = f'MARK={mark}'.encode() in (path / 'environ').read_bytes()
      title = (path / 'cmdline').read_bytes()
    except OSError:  # it has ended
      continue
    if ours and title.startswith(b'ray::') and b'MapBatches(Shards)' in title:
      found.append(int(path.name))
  return sorted(found)


@pytest.mark.skipif(sys.platform != 'linux', reason='finds actors in /proc')
def test_a_killed_actor_leaves_the_same_dump(tmp_path):
  pytest.importorskip('ray')
  tokenizer = tmp_path / 'tok'
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema', depth=1)), tokenizer)
  (tmp_path / 'images').mkdir()
  for i in range(IMAGES):
    data = makers.png(i, 200, 200) if i % 20 else b'broken'
    (tmp_path / 'images' / f'{i:03}.png').write_bytes(data)
  mark = uuid.uuid4().hex
  environment = tiny.alone(1) | {
    'MARK': mark,
    'PYTHONPATH': str(runs.ROOT),
    'RAY_USAGE_STATS_ENABLED': '0',
  }

  def command(out, module):
    return [
      sys.executable, *module, f'--tokenizer={tokenizer}',
      f'--data={tmp_path / "images"}', f'--out={tmp_path / out}',
      f'--shard_images={EACH}', '--batch_size=2',
    ]  # fmt: skip

  subprocess.run(
    command('one', ('-m', 'vqrae_jax.tokenize')), env=environment, check=True
  )
  example = runs.ROOT / 'examples' / 'ray_tokenize.py'
  driver = subprocess.Popen(
    [*command('ray', (str(example),)), '--actors=2', '--local=4'],
    env=environment, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  done = lambda: [*(tmp_path / 'ray' / 'finished').glob('*')]  # noqa: E731
  while not done() and driver.poll() is None:
    time.sleep(0.002)
  running = actors(mark)
  os.kill(running[0], signal.SIGKILL)
  assert len(done()) < IMAGES // EACH, 'killed too late'
  said, _ = driver.communicate(timeout=500)
  assert driver.returncode == 0
  assert len(running) == 2
  assert f'finished with {IMAGES - IMAGES // 20} images, 8 skipped' in said
  assert tiny.files(tmp_path / 'ray') == tiny.files(tmp_path / 'one')
