"""`tokenize`: the indices of the images, whatever the source and the format;
restarts, damaged input, several workers."""

import functools
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import runs, tiny
from tests.data import makers
from vqrae_jax import export, inference, quantizers, tokenize
from vqrae_jax.data.pipeline import Augment, augment_image
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.tokens import FORMATS, Layout, open_dump

pytestmark = pytest.mark.usefixtures('one_device')
SIZES = (24, 24), (40, 17), (12, 30), (16, 16), (64, 48)
BROKEN = 5, 11  # of 20


def photo(i):
  return tiny.images(1, *SIZES[i % 5], seed=i)[0]


def broken(i):
  return makers.encoded(Image.fromarray(photo(i)))[:90]


def encoded(i):
  return broken(i) if i in BROKEN else makers.encoded(Image.fromarray(photo(i)))


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """Tokenizers; 20 images of two classes, 2 of them broken, as a folder, tars
  and ArrayRecord files."""
  root = tmp_path_factory.mktemp('tokenize')
  for name, kind in (('tok', 'vq-ema'), ('residual', 'residual-vq')):
    made = tiny.built(tiny.model(kind, depth=1))
    export.save_tokenizer(*made, root / name)
  for i in range(20):
    path = root / 'folder' / 'ab'[i // 10] / f'{i:02}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(i))
  for folder in ('tars', 'records'):
    (root / folder).mkdir()
  for shard in range(3):
    numbers = range(7 * shard, min(7 * shard + 7, 20))
    members = [
      member
      for i in numbers
      for member in ((f'{i:02}.png', encoded(i)), (f'{i:02}.cls', b'%d' % i))
    ]
    makers.tar(root / 'tars' / f'{shard}.tar', members)
    records = [makers.example(image=encoded(i), label=i) for i in numbers]
    makers.array_record(root / 'records' / f'{shard}.array_record', records)
  return root


@pytest.fixture(autouse=True)
def inside(here, monkeypatch, tmp_path_factory):
  monkeypatch.chdir(here)
  cache = tmp_path_factory.getbasetemp() / 'tar-cache'
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(cache))


def run(tmp_path, flags='', data='folder', tokenizer='tok'):
  """The folder of a dump that the command wrote."""
  out = tmp_path / 'out'
  tokenize.main([
    f'--tokenizer={tokenizer}', f'--data={data}', f'--out={out}',
    '--batch_size=4', *flags.split(),
  ])  # fmt: skip
  return out


@pytest.fixture(scope='module')
def expected(here):
  """i32[18 *index_shape] of the images that can be read, by tokenizer: each
  alone, resized and cropped as for the statistics of latents."""
  augment = Augment((16, 16), resize=16, crop='center', flip=False)
  rng = np.random.default_rng(0)
  images = np.stack(
    [
      augment_image(photo(i), augment, rng)
      for i in range(20)
      if i not in BROKEN
    ]
  )

  def encode(name):
    made = export.load_tokenizer(here / name)
    encode = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)
    return np.asarray(encode(*made, images))

  return {name: encode(name) for name in ('tok', 'residual')}


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_holds_the_indices(tmp_path, here, name, expected, capsys):
  """Of a folder; keys, labels and boxes beside them, broken images listed."""
  extra = dict(parquet='pyarrow', hdf5='h5py').get(name)
  if extra:
    pytest.importorskip(extra)
  flags = f'--format={name} --shard_images=6 --verify'
  flags += ' --eod=99' * (name == 'megatron')
  out = run(tmp_path, flags)
  fingerprint = read_json(here / 'tok' / 'config.json')['fingerprint']
  dump = open_dump(out, fingerprint)
  rows = list(dump)
  tokens = np.stack([row['tokens'] for row in rows])
  np.testing.assert_array_equal(tokens, expected['tok'])
  good = [i for i in range(20) if i not in BROKEN]
  keys = [f'{"ab"[i // 10]}/{i:02}.png' for i in good]
  assert [row['key'] for row in rows] == keys
  assert [row['label'] for row in rows] == [i // 10 for i in good]
  assert dump.info['classes'] == ['a', 'b']
  lost = [row[1] for row in dump.info['skipped']]
  assert lost == ['a/05.png', 'b/11.png']
  said = capsys.readouterr().out
  for words in ('4 shards of 18 images (2 skipped)', '18 images, 288 tokens',
                'verified 18 images: 100.00%'):  # fmt: skip
    assert words in said
  np.testing.assert_array_equal(
    dump.codebook(),
    export.load_tokenizer('tok')[1]['codebook']['quantizer']['codes'],
  )


@pytest.mark.parametrize('data', ('tars', 'records'))
def test_a_file_of_images_is_a_shard(tmp_path, data, expected):
  """Labels of the samples; LlamaGen's numbers go on through the files."""
  out = run(tmp_path, '--format=llamagen', data)
  dump = open_dump(out)
  tokens = np.stack([row['tokens'] for row in dump])
  np.testing.assert_array_equal(tokens, expected['tok'])
  good = [i for i in range(20) if i not in BROKEN]
  assert [row['label'] for row in dump] == good
  if data == 'tars':
    assert [row['key'] for row in dump] == [f'{i:02}.png' for i in good]
  assert [shard['images'] for shard in dump.info['shards']] == [6, 6, 6]
  found = {path.stem for path in out.glob('shards/imagenet16_codes/*.npy')}
  assert found == {str(i) for i in good}


def test_several_codes_a_token(tmp_path, expected):
  out = run(tmp_path, '--bos=0 --offset=1', tokenizer='residual')
  dump = open_dump(out)
  tokens = np.stack([row['tokens'] for row in dump])
  np.testing.assert_array_equal(tokens, expected['residual'])
  assert dump.codebook().shape == (2, 64, 8)
  assert '4 × 4 × 2' in (out / 'README.md').read_text()


def test_each_device_searches_for_its_own_tokens(tmp_path, monkeypatch):
  sizes = []

  def encode(tokenizer, variables, images):
    sizes.append(jax.sharding.get_abstract_mesh().size)
    return images[..., 0]

  monkeypatch.setattr(inference, 'encode_to_indices', encode)
  job = tokenize.Job('tok', 'folder', str(tmp_path / 'out'))
  tokenize.Worker(job).encode(np.zeros((8, 16, 16, 3), np.uint8))
  assert sizes == [8]


@pytest.mark.parametrize('kind', ('fsq-fourier', 'vq-cosine', 'lfq'))
def test_the_codebook_has_the_codes(tmp_path, kind):
  """Those that the decoder reads, for each index."""
  made = tiny.built(tiny.model(kind, depth=1))
  export.save_tokenizer(*made, tmp_path / 'tok')
  tokenize.Worker(
    tokenize.Job(str(tmp_path / 'tok'), 'folder', str(tmp_path / 'out'))
  )
  codebook = np.load(tmp_path / 'out' / 'codebook.npy')
  run = jax.jit(vqrae_jax.reconstruct, static_argnums=0)
  out = run(*export.load_tokenizer(tmp_path / 'tok'), tiny.images(2))
  found = out.quantizer
  np.testing.assert_array_equal(codebook[found.indices], found.codes)


_VQ = dict(name='vq', num_codes=5)
_RESIDUAL = dict(name='residual', stages=3, quantizer=_VQ)
_FSQ = dict(name='fsq', levels=(5, 5), bound='clip')


@pytest.mark.parametrize(
  ('section', 'count'),
  (
    (_RESIDUAL, 3),
    (_RESIDUAL | dict(quantizer=_FSQ), 3),
    (dict(name='grouped', groups=2, quantizer=_RESIDUAL), 6),
  ),
)
def test_the_codes_of_several_add_up(section, count):
  """f32[q K c]: sums over stages, groups side by side."""
  quantizer = quantizers.build(section, 16, 'float32')
  z = jax.random.normal(jax.random.key(0), (1, 2, 2, 16))
  variables = tiny.drawn(quantizer, z)

  @jax.jit
  def run(variables, z):
    apply = functools.partial(quantizer.apply, variables)
    indices = apply(z, method='latents_to_indices')
    codes = apply(indices, method='indices_to_codes')
    return apply(method='all_codes'), indices, codes

  tables, indices, codes = run(variables, z)
  assert tables.shape[:2] == (count, quantizer.codebook_size)
  each = [tables[i][indices[..., i]] for i in range(count)]
  found = [sum(each[i : i + 3]) for i in range(0, count, 3)]
  np.testing.assert_allclose(np.concatenate(found, -1), codes, atol=1e-6)


def test_ten_views_of_an_image():
  """Corners by rows and the centre, of a square of 1.1 times the size at the
  centre; boxes are where they come from; then each mirrored."""
  ramp = np.stack(np.meshgrid(np.arange(200), np.arange(120), [9]), -1)
  image = Image.fromarray(ramp[:, :, 0].astype(np.uint8))  # x, y, 9

  class Source(list):
    picture = list.__getitem__

  layout = Layout(64, (4, 4), (60, 60), crops=5, flip=True)
  views = tokenize.Views(Source([image]), layout, 66)
  found = views[0].astype(float)
  assert found.shape == (10, 60, 60, 3)
  np.testing.assert_array_equal(found[5:], found[:5, :, ::-1])
  boxes = np.array(views.boxes[0])
  scale = 66 / 120
  left = (200 * scale - 66) / 2
  corners = np.add([0, left], [(0, 0), (0, 6), (6, 0), (6, 6), (3, 3)])
  np.testing.assert_allclose(boxes[:, :2] * scale, corners, atol=0.51)
  np.testing.assert_allclose(np.ptp(boxes[:, ::2], 1), 60 / scale, atol=0.01)
  for view, (top, left, bottom, right) in zip(found[:5], boxes, strict=True):
    x, y = view[:, :, 0], view[:, :, 1]
    np.testing.assert_allclose(x.mean(), (left + right) / 2 - 0.5, atol=0.6)
    np.testing.assert_allclose(y.mean(), (top + bottom) / 2 - 0.5, atol=0.6)


def test_a_resized_view_may_be_no_square():
  """`side` is what the image's shorter side becomes; five crops alone need the
  image to cover their frame."""
  image = Image.fromarray(np.zeros((400, 400, 3), np.uint8))

  class Source(list):
    picture = list.__getitem__

  for crops, height in ((1, 64 * 4 / 3), (5, 64 * 400 / 450)):
    layout = Layout(64, (4, 6), (64, 96), crops=crops)
    views = tokenize.Views(Source([image]), layout, 300)
    assert views[0].shape == (crops, 64, 96, 3)
    top, _, bottom, _ = views.boxes[0][-1]
    np.testing.assert_allclose(bottom - top, height, atol=0.01)


def test_views_are_rows_of_their_own(tmp_path, expected):
  """The centre of one crop, and its mirror image."""
  out = run(tmp_path, '--flip --format=llamagen --shard_images=7')
  dump = open_dump(out)
  assert len(dump) == 36
  for image in range(18):
    np.testing.assert_array_equal(
      dump[2 * image]['tokens'], expected['tok'][image]
    )
  codes = np.load(out / 'shards' / 'imagenet16_codes' / '19.npy')
  assert codes.shape == (1, 2, 16)
  np.testing.assert_array_equal(codes[0, 1], dump[35]['tokens'].ravel())


def test_workers_share_and_skip(tmp_path, capsys):
  """Three workers, the first of them twice, give what one gives."""
  (tmp_path / 'one').mkdir()
  one = run(tmp_path / 'one', data='tars')
  for i in (2, 0, 0, 1):
    out = run(tmp_path, f'--shards={i}/3', data='tars')
  said = capsys.readouterr().out
  assert '1 of 3 shards are not finished' in said
  assert '1 already finished' in said
  assert tiny.files(out) == tiny.files(one)
  before = tiny.files(out)
  for flags, words in (
    ('--offset=5', 'offset=1, not 5'), ('--crops=5', 'crops=1, not 5'),
    ('--size=32', 'image_size'), ('--format=webdataset', 'format='),
  ):  # fmt: skip
    with pytest.raises(UserError, match=f'--out=.*{words}'):
      run(tmp_path, flags, data='tars')
  for keys, words in (
    (dict(tokenizer='residual', data='tars'), 'fingerprint|index_shape'),
    (dict(data='tars/{0,1}.tar'), 'other files'),
    (dict(data='folder'), 'other files'),
  ):
    with pytest.raises(UserError, match=f'--out=.*({words})'):
      run(tmp_path, **keys)
  assert tiny.files(out) == before


def test_damaged_tars_lose_no_other_image(tmp_path, here, expected):
  """One that ends early, one of zeros, one without images."""
  folder = tmp_path / 'damaged'
  folder.mkdir()
  data = (here / 'tars' / '0.tar').read_bytes()
  (folder / '0.tar').write_bytes(data[: data.index(b'03.png') + 700])
  (folder / '1.tar').write_bytes(b'\0' * 10240)
  makers.tar(folder / '2.tar', [('1.txt', b'words')])
  (folder / '3.tar').write_bytes((here / 'tars' / '2.tar').read_bytes())
  out = run(tmp_path, '--format=webdataset --verify', str(folder))
  dump = open_dump(out)
  keys = [f'{i:02}.png' for i in (0, 1, 2, *range(14, 20))]
  assert [row['key'] for row in dump] == keys
  tokens = np.stack([row['tokens'] for row in dump])
  want = expected['tok'][[0, 1, 2, *range(12, 18)]]
  np.testing.assert_array_equal(tokens, want)
  assert {row[0] for row in dump.info['skipped']} == {'0.tar', '1.tar', '2.tar'}
  with pytest.raises(UserError, match='no image .* can be read'):
    run(tmp_path / 'none', data=str(folder / '{1,2}.tar'))


def test_real_shards(tmp_path, shared_data):
  """A tar of CIFAR-10: keys and labels of 1500 images in order."""
  path = shared_data / 'cifar10_wds' / 'test-00000.tar'
  dump = open_dump(run(tmp_path, '--verify --batch_size=64', str(path)))
  shard, tokens = dump.shard(0)
  with tarfile.open(path) as file:
    names = [m.name for m in file if m.name.endswith('.jpg')]
    labels = [
      int(file.extractfile(name.replace('.jpg', '.cls')).read())
      for name in names
    ]
  assert (shard.keys, shard.labels) == (names, labels)
  assert tokens.shape == (1500, 1, 4, 4) and not dump.info['skipped']


def test_a_shard_without_any_image_is_no_accident(tmp_path):
  folder = tmp_path / 'bad'
  folder.mkdir()
  for i in range(20):
    (folder / f'{i}.png').write_bytes(broken(i))
  with pytest.raises(UserError, match='none of the 20 images'):
    run(tmp_path, data=str(folder))
  with pytest.raises(UserError, match='no image .* can be read'):
    run(tmp_path / 'small', '--shard_images=5', str(folder))
  dump = open_dump(tmp_path / 'small' / 'out')
  assert len(dump.info['skipped']) == 20 and not len(dump)
  # Nor is one image that is all the data.
  with pytest.raises(UserError, match='none of the 1 images'):
    run(tmp_path / 'one', data=str(folder / '0.png'))


def test_verify_finds_indices_of_other_images(tmp_path, here):
  folder = tmp_path / 'images'
  folder.mkdir()
  for i in range(6):
    (folder / f'{i}.png').write_bytes(makers.png(i, 64, 64))
  run(tmp_path, '--verify', str(folder))
  for i in range(6):
    (folder / f'{i}.png').write_bytes(makers.png(i + 6, 64, 64))
  with pytest.raises(UserError, match='indices of 6 images'):
    run(tmp_path, '--verify', str(folder))


@pytest.mark.parametrize('name', ('hdf5', 'parquet', 'webdataset'))
def test_names_of_any_bytes(tmp_path, name):
  pytest.importorskip(dict(hdf5='h5py', parquet='pyarrow').get(name, 'numpy'))
  for folder in ('a', 'b'):
    (tmp_path / 'images' / folder).mkdir(parents=True)
    path = os.path.join(os.fsencode(tmp_path), b'images', folder.encode())
    with open(os.path.join(path, b'\xff \xc3\xa9.png'), 'wb') as file:
      file.write(makers.png(0))
  out = run(tmp_path, f'--format={name} --verify', str(tmp_path / 'images'))
  keys = [row['key'] for row in open_dump(out)]
  assert keys == ['a/\\xff é.png', 'b/\\xff é.png']


@pytest.mark.parametrize(
  'flags, words',
  [
    ('--format=arrayrecord', '"array_record"'),
    ('--shards=3/3', r'--shards=3/3.*0/4'),
    ('--shards=x', '--shards=x'),
    ('--crops=3', '--crops=3'),
    ('--size=17', '17x17'),
    ('--resize=8', '--resize=8'),
    ('--format=jsonl --offset=1', '--offset'),
    ('--format=megatron', '--eod'),
    ('--bos=3', '--bos=3.* 65 is free'),
    ('--eod=-1', '--eod=-1'),
    ('--offset=2147483600', '--offset=2147483600'),
    ('--data=flat --format=jsonl', 'sub-folder'),
    ('--batch_size=0', 'batch_size=0'),
    ('--tokenizer=continuous', 'continuous'),
  ],
)
def test_bad_flags_are_one_line(tmp_path, here, flags, words):
  if not (here / 'flat').exists():
    (here / 'flat').mkdir()
    (here / 'flat' / '0.png').write_bytes(encoded(0))
    made = tiny.built(tiny.model('none', depth=1))
    export.save_tokenizer(*made, here / 'continuous')
  with pytest.raises(UserError, match=words) as error:
    run(tmp_path, flags)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def command(out, flags=''):
  return [
    sys.executable, '-m', tokenize.MODULE, '--tokenizer=tok', '--data=folder',
    f'--out={out}', '--batch_size=4', '--shard_images=2', *flags.split(),
  ]  # fmt: skip


def environment():
  """Of one device; imports and compilations alone are alike."""
  return tiny.alone(1) | {'PYTHONPATH': str(runs.ROOT)}


@pytest.mark.slow
def test_ten_kills_leave_the_same_dump(tmp_path):
  """SIGKILL at any moment after a worker's start of a shard."""
  subprocess.run(command(tmp_path / 'a'), env=environment(), check=True)
  out, draw, killed = tmp_path / 'b', random.Random(1), 0
  done = lambda: len([*out.glob('finished/*')])  # noqa: E731
  while killed < 10:
    worker = subprocess.Popen(command(out), env=environment())
    before = done()
    while worker.poll() is None and done() == before:
      time.sleep(0.002)
    time.sleep(draw.random() * 0.05)
    worker.send_signal(signal.SIGKILL)
    if worker.wait() == 0:
      for path in [*out.glob('finished/*')][:8]:
        path.unlink()
    else:
      killed += 1
  subprocess.run(command(out), env=environment(), check=True)
  assert tiny.files(out) == tiny.files(tmp_path / 'a')


@pytest.mark.slow
def test_two_hosts_of_a_pod_share_the_shards(tmp_path):
  subprocess.run(command(tmp_path / 'a'), env=environment(), check=True)
  hosts = f'--num_processes=2 --coordinator_address={runs.free_address()}'
  running = [
    subprocess.Popen(
      command(tmp_path / 'b', f'{hosts} --process_id={i}'),
      env=environment(), text=True, stdout=subprocess.PIPE,
    )
    for i in range(2)
  ]  # fmt: skip
  said = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [0, 0]
  assert all('wrote 5 shards of 9 images' in out for out in said)
  assert tiny.files(tmp_path / 'a') == tiny.files(tmp_path / 'b')
