"""safetensors, shards, npz, and what `open_weights` says of other files."""

import dataclasses
import json
import pickle
import struct
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights.files import error_of, read_all, refused, same
from vqrae_jax.weights.files import write_safetensors
from vqrae_jax.weights.hub import parse_source

torch = pytest.importorskip('torch')

RNG = np.random.default_rng(0)
ARRAYS = {
  'params/img/kernel': RNG.normal(size=(3, 4, 5)).astype('f4'),
  'half': RNG.normal(size=(4, 6)).astype('f2'),
  'bf16': RNG.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
  'wide': RNG.normal(size=7),
  'count': np.arange(4),
  'scalar': np.array(2.5, 'f4'),
  'empty': np.zeros((0, 3), 'f4'),
}


def test_safetensors(tmp_path):
  save_file(ARRAYS, tmp_path / 'w.safetensors')
  same(tmp_path / 'w.safetensors', ARRAYS)
  same(str(tmp_path), ARRAYS)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
  save(tmp_path / 'w.npz', **ARRAYS, fortran=np.asfortranarray(ARRAYS['half']))
  same(tmp_path / 'w.npz', ARRAYS | {'fortran': ARRAYS['half']})
  save(tmp_path / 's.npz', wide=ARRAYS['wide'].astype('>f8'))
  same(tmp_path / 's.npz', {'wide': ARRAYS['wide']})


@pytest.mark.parametrize('dtype', ('O', 'U4', 'V3', 'c16'))
def test_npz_holds_numbers_only(tmp_path, dtype):
  np.savez(tmp_path / 'w.npz', good=np.ones(2), bad=np.zeros(2, dtype))
  refused(tmp_path / 'w.npz', '"bad"')


def test_written_safetensors_are_the_librarys(tmp_path):
  """An array at a time, in order of names, whatever its layout."""
  values = ARRAYS | {'turned': RNG.normal(size=(3, 4)).T}
  read = mock.Mock(side_effect=values.get)
  with (tmp_path / 'w.safetensors').open('wb') as file:
    write_safetensors(file, values, read)
  assert read.call_args_list == [mock.call(name) for name in sorted(values)]
  same(tmp_path, values)  # read by the library


def index(tmp_path, where):
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  return path


def test_shards(tmp_path):
  where = {k: f'model-{i % 2}.safetensors' for i, k in enumerate(ARRAYS)}
  for name in set(where.values()):
    shard = {k: ARRAYS[k] for k in where if where[k] == name}
    save_file(shard, tmp_path / name)
  path = index(tmp_path, where)
  same(path, ARRAYS)
  same(tmp_path, ARRAYS)
  for wrong, key in (
    (where | {'extra': 'model-0.safetensors'}, 'extra'),
    ({k: v for k, v in where.items() if k != 'wide'}, 'wide'),
    (where | {'wide': 'model-0.safetensors'}, 'wide'),
  ):
    refused(index(tmp_path, wrong), f'"{key}"')
  one = (tmp_path / 'model-0.safetensors').read_bytes()
  save_file(ARRAYS, tmp_path / 'model-0.safetensors')  # all, so some twice
  twice = min(k for k in where if where[k] == 'model-1.safetensors')
  refused(index(tmp_path, where), f'"{twice}"')
  (tmp_path / 'model-0.safetensors').write_bytes(one)
  index(tmp_path, where)
  (tmp_path / 'model-1.safetensors').unlink()
  refused(path, 'model-1.safetensors is missing')
  path.rename(tmp_path / 'pytorch_model.bin.index.json')
  refused(tmp_path, 'model-1.safetensors is missing')


@pytest.mark.parametrize(
  'content',
  [
    '{',
    '[]',
    '{"weight_map": 3}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": ""}}',
    '{"weight_map": {"a": "../x.safetensors"}}',
    '{"weight_map": {"a": "model.safetensors.index.json"}}',
    '{"weight_map": {"a": ".."}}',
    '[' * 100_000,
  ],
)
def test_no_index(tmp_path, content):
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(content)
  refused(path)


def test_cut_anywhere_or_a_bit_flipped(tmp_path):
  save_file(ARRAYS, tmp_path / 'w.safetensors')
  np.savez(tmp_path / 'w.npz', **ARRAYS)
  for path in (tmp_path / 'w.safetensors', tmp_path / 'w.npz'):
    data = path.read_bytes()
    for stop in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
      path.write_bytes(data[:stop])
      refused(path, 'empty' if stop == 0 else 'damaged')
  flipped = bytearray(data)
  flipped[data.index(ARRAYS['wide'].tobytes()) + 9] ^= 8
  path.write_bytes(flipped)
  refused(path, 'CRC')


@pytest.mark.parametrize(
  'shape', ['(' * 200, '(2,), (1,)', '(0, 4611686018427387904)', '(10**12,)']
)
def test_npz_headers_that_lie(tmp_path, shape):
  header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n"
  npy = b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header))
  with zipfile.ZipFile(tmp_path / 'w.npz', 'w') as file:
    file.writestr('w.npy', npy + header.encode() + bytes(8))
  refused(tmp_path / 'w.npz')


def test_safetensors_of_an_impossible_shape(tmp_path):
  entry = dict(dtype='F32', shape=[0, 1 << 62], data_offsets=[0, 0])
  text = json.dumps({'w': entry}).encode()
  path = tmp_path / 'w.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text)
  refused(path)


def test_names_and_contents_that_disagree(tmp_path):
  save_file(ARRAYS, tmp_path / 'a.safetensors')
  np.savez(tmp_path / 'a.npz', w=np.ones(2))
  state = {'w': torch.ones(2)}
  torch.save(state, tmp_path / 'a.pt')
  old = tmp_path / 'old.bin'
  torch.save(state, old, _use_new_zipfile_serialization=False)
  assert read_all(old).keys() == state.keys()
  (tmp_path / 'a.pickle').write_bytes(pickle.dumps({'w': 1}))
  for old, new, words in (
    ('old.bin', 'd.npz', 'rename'),
    ('a.pickle', 'd.pt', 'torch.save'),
    ('a.safetensors', 'b.pt', 'rename'),
    ('a.pt', 'b.safetensors', 'rename'),
    ('a.npz', 'c.pt', '"w.npy"'),
    ('a.pt', 'c.npz', 'data.pkl'),
    ('a.pt', 'b.onnx', '.safetensors'),
  ):
    (tmp_path / new).write_bytes((tmp_path / old).read_bytes())
    refused(tmp_path / new, words)


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'', 'is empty'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS pointer'),
    (b'\n<!DOCTYPE html><html>', 'web page'),
    (b'\0' * 100, 'damaged'),
    (bytes(257) + b'ustar', 'tar archive'),
    (b'\xff' * 8 + b'{', ''),
    (b'PK\x05\x06' + bytes(18), ''),
  ],
)
@pytest.mark.parametrize('ending', ['safetensors', 'npz', 'pt'])
def test_contents_that_are_no_weights(tmp_path, content, words, ending):
  path = tmp_path / f'w.{ending}'
  path.write_bytes(content)
  refused(path, words)


def test_places_without_weights(tmp_path):
  refused(tmp_path / 'none.pt', 'there is no such file')
  refused(tmp_path, 'it has no model.safetensors')
  for name in 'ab':
    save_file({}, tmp_path / f'{name}.safetensors')
  refused(tmp_path, '2 .safetensors files')


@pytest.mark.parametrize(
  ('word', 'want'),
  [
    ('hf:a/b.c@refs/pr/1', ('hf', 'a/b.c', 'refs/pr/1')),
    ('rae:x/decoder.pt', ('rae', 'x/decoder.pt', None)),
    ('a/b:c', ('path', 'a/b:c', None)),
  ],
)
def test_source_words(word, want):
  assert dataclasses.astuple(parse_source(word)) == want


@pytest.mark.parametrize(
  ('word', 'words'),
  [
    ('s3://bucket/x', 'unknown scheme "s3:"'),
    ('rae:', 'rae:FILE'),
    ('hf:../x', 'hf:ORG/NAME'),
    ('hf:a/b@', 'hf:ORG/NAME'),
    (' ', 'an empty source'),
  ],
)
def test_source_words_that_are_none(word, words):
  assert words in error_of(parse_source, word)
