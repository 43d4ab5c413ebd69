"""`evaluate` against its figures computed by hand; devices, hosts, restarts."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vqrae_jax
from tests import runs, tiny
from tests.data import makers
from vqrae_jax import export
from vqrae_jax.data.pipeline import Augment, augment_image
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import __main__ as command
from vqrae_jax.evaluate import fid, metrics, part, probes
from vqrae_jax.nn.inception import InceptionV3
from vqrae_jax.pretrained import networks
from vqrae_jax.weights import load

BAD = 'a/2.png'
FIGURES = ('psnr', 'psnr_mean', 'ssim', 'rfid', 'perplexity', 'knn', 'linear')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A tokenizer, random Inception weights in a file, five images of two
  classes of which one is damaged."""
  root = tmp_path_factory.mktemp('evaluate')
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema')), root / 'tokenizer')
  rng = np.random.default_rng(0)

  def drawn(leaf):
    if len(leaf.shape) < 4:  # of a batch norm
      return rng.uniform(0.5, 1.5, leaf.shape).astype('f4')
    scale = (2 / np.prod(leaf.shape[:3])) ** 0.5
    return scale * rng.standard_normal(leaf.shape, 'f4')

  draw = functools.partial(networks.random, 'rfid')
  shapes = jax.eval_shape(draw, jax.random.key(0))['net']
  tree = jax.tree.map(drawn, shapes)
  arrays = load.export(networks.INCEPTION_TABLE, tree)
  save_file(arrays, root / 'inception.safetensors')
  for i in range(5):
    path = root / 'photos' / 'ab'[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    image = tiny.images(1, 20 + 3 * i, 40 - 3 * i, seed=7 + i)[0]
    Image.fromarray(image).save(path)
  broken = root / 'photos' / BAD
  broken.write_bytes(broken.read_bytes()[:120])
  return root


def on_one_device(patch):
  """Batches of two."""
  devices = jax.devices()[:1]
  patch.setattr(jax, 'local_devices', lambda: devices)
  patch.setattr(part, 'ROWS', 2)


def run(world, out, *flags):
  argv = [f'--tokenizer={world}/tokenizer', f'--data={world}/photos',
          f'--out={out}', '--metrics=rfid', *flags,
          f'--weights=inception={world}/inception.safetensors']  # fmt: skip
  command.main(argv)
  return json.loads(out.read_text())


def without_networks(world, data, out, *flags):
  command.main([f'--tokenizer={world}/tokenizer', f'--data={data}',
                f'--out={out}', '--metrics=', *flags])  # fmt: skip
  return json.loads(out.read_text())


def near(found, want, rtol=1e-6):
  for name in FIGURES:
    np.testing.assert_allclose(found[name], want[name], rtol, err_msg=name)


@pytest.fixture(scope='module')
def by_hand(world):
  """The figures of the four images, all at once."""
  source = open_source(f'{world}/photos')
  augment = Augment((16, 16), resize=16, crop='center', flip=False)
  kept = [i for i in range(5) if source.name(i) != BAD]
  images = np.stack([augment_image(source[i], augment, None) for i in kept])
  tokenizer, variables = vqrae_jax.load_tokenizer(world / 'tokenizer')
  out = jax.jit(vqrae_jax.reconstruct, static_argnums=0)(
    tokenizer, variables, images
  )
  recon = np.round(np.clip(out.images, 0, 1) * 255)
  given = {'inception': world / 'inception.safetensors'}
  (path,) = networks.files_of(['rfid'], given)['rfid'].values()
  net = networks.load('rfid', {'inception': path})['net']
  apply = jax.jit(InceptionV3().apply)
  statistics = [
    fid.Moments.of(apply({'params': net}, x.astype('f4'))).statistics()
    for x in (images, recon)
  ]
  figures = metrics.compare(recon / 255, images, 4).results()
  labels = np.array([source.label(i) for i in kept], np.int32)
  latents = np.asarray(out.latents).mean((1, 2))
  counts = np.bincount(np.asarray(out.quantizer.indices).ravel(), minlength=64)
  return figures | dict(
    rfid=fid.frechet_distance(*statistics),
    statistics=statistics,
    perplexity=float(np.exp(metrics.entropy(counts))),
    knn=probes.knn(latents, labels),
    linear=probes.linear(latents, labels),
  )


@pytest.fixture(scope='module')
def measured(world, tmp_path_factory):
  """A run and its folder."""
  folder = tmp_path_factory.mktemp('measured')
  with pytest.MonkeyPatch.context() as patch:
    on_one_device(patch)
    return run(world, folder / 'm.json'), folder


def test_figures_page_and_protocol(world, by_hand, measured):
  found, folder = measured
  assert found['images'] == 4 and [*found['skipped']] == [BAD]
  near(found, by_hand)
  card = found['protocol']
  config = json.loads((world / 'tokenizer' / export.CONFIG).read_text())
  assert card['fingerprint'] == config['fingerprint']
  assert card['rfid']['reference'] == 'the same crops'
  assert len(card['weights']['inception']['sha256']) == 64
  assert found['classes'] == 2 and 0 <= found['linear_quantized'] <= 1
  # The best, the median and the worst, enlarged.
  page = Image.open(folder / 'm.png')
  assert 3 * 192 < page.width < 4 * 192 + 140
  assert {p.name for p in folder.iterdir()} == {'m.json', 'm.png'}


def stop_after_a_batch(patch):
  """The sizes of batches, filled as they are measured; after the first, saved,
  the user stops the command."""
  measure, seen = part.evaluator.measure, []

  def stopped(*args, **options):
    for found in measure(*args, **options):
      seen.append(len(found.owners))
      yield found
      if len(seen) == 1:
        raise KeyboardInterrupt

  patch.setattr(part, 'SAVE_EVERY_S', 0)
  patch.setattr(part.evaluator, 'measure', stopped)
  return seen


def test_a_stopped_evaluation_goes_on(
  world, measured, tmp_path, monkeypatch, capsys
):
  """From its last batch, to the same bits."""
  on_one_device(monkeypatch)
  seen = stop_after_a_batch(monkeypatch)
  with pytest.raises(KeyboardInterrupt):
    run(world, tmp_path / 'm.json')
  assert not (tmp_path / 'm.json').exists()
  found = run(world, tmp_path / 'm.json')
  assert found == measured[0] and seen == [2, 2]
  assert {p.name for p in tmp_path.iterdir()} == {'m.json', 'm.png'}
  out = capsys.readouterr().out
  assert f'{found["rfid"]:.3f}' in out and '2,048' in out


def test_other_files_are_measured_from_the_start(world, tmp_path, monkeypatch):
  """A stopped evaluation goes on with the files that it began with."""
  on_one_device(monkeypatch)
  photos = shutil.copytree(world / 'photos', tmp_path / 'photos')
  stop_after_a_batch(monkeypatch)
  with pytest.raises(KeyboardInterrupt):
    without_networks(world, photos, tmp_path / 'm.json')
  assert (tmp_path / 'm.json.parts').is_dir()
  shutil.copy(photos / 'a' / '0.png', photos / BAD)
  found = without_networks(world, photos, tmp_path / 'm.json')
  assert found['images'] == 5 and not found['skipped']


def test_classes_of_one_image_have_no_probes(world, tmp_path, monkeypatch):
  """And a picture that is there is not replaced."""
  on_one_device(monkeypatch)
  args = world, world / 'photos', tmp_path / 'm.json', '--images=2'
  (tmp_path / 'm.png').write_bytes(b'mine')
  with pytest.raises(UserError, match='m.png exists'):
    without_networks(*args)
  (tmp_path / 'm.png').unlink()
  found = without_networks(*args)
  assert found['images'] == 2 and 'knn' not in found
  page = Image.open(tmp_path / 'm.png')  # none twice
  assert 2 * 192 < page.width < 3 * 192 + 140


def test_damaged_files_are_named(world, tmp_path, monkeypatch):
  """A record, also as the first, which has no label; the others are probed by
  theirs. A tar that ends early."""
  on_one_device(monkeypatch)
  good = [makers.example(image=makers.png(i), label=i % 2) for i in range(4)]
  makers.array_record(tmp_path / 'x.array_record', [b'damaged', *good])
  path = tmp_path / 'x.array_record'
  found = without_networks(world, path, tmp_path / 'm.json')
  assert found['images'] == 4 and [*found['skipped']] == ['x.array_record:0']
  assert found['classes'] == 2 and 0 <= found['knn'] <= 1
  images = [(f'{i}.png', makers.png(i)) for i in range(4)]
  path = makers.tar(tmp_path / 'x.tar', images)
  whole = path.read_bytes()
  path.write_bytes(whole[: whole.index(b'3.png') + 700])
  found = without_networks(world, path, tmp_path / 'tar.json')
  assert found['images'] == 3 and [*found['skipped']] == ['x.tar']


@pytest.mark.slow
def test_eight_devices_and_a_named_reference(
  world, by_hand, tmp_path, monkeypatch
):
  """A row each; the statistics of the originals give the same distance."""
  (mean, covariance), _ = by_hand['statistics']
  np.savez(tmp_path / 's.npz', mu=mean, sigma=covariance)
  monkeypatch.setattr(part, 'ROWS', 1)
  found = run(world, tmp_path / 'm.json', f'--fid_stats={tmp_path}/s.npz')
  near(found, by_hand)
  assert found['protocol']['rfid']['reference']['file'] == 's.npz'


@pytest.mark.slow
def test_three_hosts_measure_as_one(world, by_hand, tmp_path):
  """Each its share; what is skipped on one is listed."""
  address = runs.free_address()
  running = [
    subprocess.Popen(
      [sys.executable, '-m', command.MODULE, f'--tokenizer={world}/tokenizer',
       f'--data={world}/photos', f'--out={tmp_path}/m.json', '--metrics=rfid',
       f'--weights=inception={world}/inception.safetensors',
       '--num_processes=3', f'--coordinator_address={address}',
       f'--process_id={i}'],
      env=tiny.alone(1) | {'PYTHONPATH': str(runs.ROOT)},
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(3)
  ]  # fmt: skip
  ends = [(*p.communicate(timeout=500), p.returncode) for p in running]
  assert [code for *_, code in ends] == [0] * 3, ends
  assert ['wrote' in out for out, *_ in ends] == [True, False, False]
  found = json.loads((tmp_path / 'm.json').read_text())
  assert found['images'] == 4 and [*found['skipped']] == [BAD]
  near(found, by_hand)
  assert {p.name for p in tmp_path.iterdir()} == {'m.json', 'm.png'}
