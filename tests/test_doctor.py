"""`doctor`: figures against brute force, findings of planted faults, the
command."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import runs, tiny
from vqrae_jax import doctor, export, quantizers
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import codebooks
from vqrae_jax.ops import codes as code_ops

K, C = 64, 8


def brute_force(z, table):
  """(indices, distances, margins) in f64, of all pairs."""
  z, table = np.asarray(z, 'f8'), np.asarray(table, 'f8')
  all_of_them = np.linalg.norm(z[:, None] - table, axis=-1)
  two = np.sort(all_of_them, -1)[:, :2]
  return all_of_them.argmin(-1), two[:, 0], two[:, 1] - two[:, 0]


def test_figures_are_brute_force(monkeypatch):
  """Through the encoder, in batches of which one is padded, by small chunks,
  on two devices; dead and copied codes among the table's."""
  monkeypatch.setattr(code_ops, 'SCORES_PER_CHUNK', 20 * K)
  tokenizer, variables = tiny.built(tiny.model('vq-ema', depth=1))
  images = tiny.images(6)
  z = np.asarray(
    jax.jit(lambda v, x: tokenizer.apply(v, x, method='project_to_code_space'))(
      variables, images
    )
  )
  rng = np.random.default_rng(0)
  table = z[rng.permutation(len(z))[:K]] + rng.normal(0, 0.05, (K, 32))
  table[50:] += 10.0  # never used
  table[7] = table[3] + 2e-3
  table[9] = table[3]
  table = table.astype('f4')
  variables['codebook']['quantizer']['codes'] = jnp.asarray(table)
  batches = [
    (images[:4], [0, 1, 2, 3]),
    (np.concatenate([images[4:], np.zeros_like(images[:2])]), [4, 5]),
  ]
  seen = []
  (stage,) = codebooks.gather(
    tokenizer, variables, batches, jax.devices()[:2], seen.append
  )
  assert seen == [4, 2]
  found = codebooks.figures(stage, K)
  indices, best, margins = brute_force(z, table)
  np.testing.assert_array_equal(stage.column('indices'), indices)
  counts = np.bincount(indices, minlength=K)
  p = counts[counts > 0] / len(z)
  entropy = -(p * np.log(p)).sum()
  between = np.linalg.norm(table[:, None] - table, axis=-1)
  near = np.where(np.tri(K, k=-1), between, np.inf).min(-1) < 0.1 * best.mean()
  assert near[[7, 9]].all()
  for name, want in dict(
    tokens=96,
    codes=K,
    used=(counts > 0).sum(),
    unused=(counts == 0).mean(),
    unused_if_even=(1 - 1 / K) ** 96,
    perplexity=math.exp(entropy),
    effective_bits=entropy / math.log(2),
    bits=6,
    near_duplicates=near.sum(),
    distance=best.mean(),
    codes_not_finite=0,
    tokens_not_finite=0,
  ).items():
    assert found[name] == pytest.approx(want, rel=1e-4), name
  # Of a sample of the tokens.
  error = (best**2).mean() / z.var(0).sum()
  assert found['relative_error'] == pytest.approx(error, rel=0.3)
  for name, x in dict(token_norm=z, code_norm=table).items():
    want = np.percentile(np.linalg.norm(x, axis=-1), [0, 5, 50, 95, 100])
    np.testing.assert_allclose([*found[name].values()], want, rtol=1e-4)
  shares = np.histogram(margins / best.mean(), codebooks.EDGES)[0] / len(z)
  np.testing.assert_allclose(found['margins']['shares'], shares, atol=0.011)
  assert found['margins']['median'] == pytest.approx(
    np.median(margins) / best.mean(), rel=1e-3
  )
  assert sorted(found['counts']) == sorted(counts[counts > 0])
  # Nothing but bf16 moves an index here, and that is counted.
  bf16 = vqrae_jax.encode_to_indices(
    tokenizer.with_run_options(dtype='bfloat16'), variables, images
  )
  moved = (np.asarray(bf16).reshape(-1) != indices).mean()
  assert found['moved'] == {
    'batch size, float32': 0,
    'devices, float32': 0,
    'bfloat16': pytest.approx(moved, abs=0.05),
    'batch size, bfloat16': pytest.approx(0, abs=0.1),
    'devices, bfloat16': pytest.approx(0, abs=0.1),
  }


def stage_of(table, z, indices=None):
  """A `Stage` of tokens, as `gather` makes it."""
  best, margin = np.zeros(len(z)), np.zeros(len(z))
  if table is not None and np.isfinite(table).all():
    indices, best, margin = brute_force(z, table)
  elif table is not None:
    indices, best = np.zeros(len(z), int), best + np.nan
  rows = dict(indices=[indices], norms=[np.linalg.norm(z, axis=-1)])
  if table is not None:
    rows |= dict(best=[best], margin=[margin])
  return codebooks.Stage('', table, rows, z, {})


def healthy():
  """(table f64[K C], tokens near its rows, equally many of each)."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(K, C))
  return table, np.tile(table, (20, 1)) + rng.normal(0, 0.2, (20 * K, C))


def test_one_finite_code_has_no_margin():
  table, z = healthy()
  stage = stage_of(table, z)
  stage.rows['margin'] = [np.full(len(z), np.inf)]
  assert 'median' not in codebooks.figures(stage, K)['margins']


def test_a_table_of_several_scales_is_judged_by_their_tokens():
  """Whatever each search has kept: of one token here, of a thousand there."""
  table, z = healthy()
  few, many = stage_of(table, z[:20]), stage_of(table, z)
  few.sample, many.sample = few.sample + 100, many.sample[: len(z) // 2]
  sample = codebooks.merged([few, many]).sample
  far = (sample.mean(-1) > 50).sum()
  assert far / len(sample) == pytest.approx(20 / (20 + len(z)), rel=0.1)


def keys_of(quantizer, figures):
  """{key without its value} of all findings."""
  found = doctor.findings(quantizer, [figures])
  assert all(f['what'] and f['keys'] and '\n' not in f['what'] for f in found)
  return {key.partition('=')[0] for f in found for key in f['keys']}


def built(**section):
  return quantizers.build(section, C, 'float32')


EMA = dict(name='vq', num_codes=K)
SIMVQ = dict(name='simvq', num_codes=K, code_dim=C, projection=False)


def planted(fault):
  table, z = healthy()
  if fault == 'dead':
    table[10:] += 50
  elif fault == 'copies':
    table[1:9] = table[0]
  elif fault == 'long':
    z = 39 * z
  elif fault == 'nan':
    table[3, 2] = np.nan
  elif fault == 'lost':
    z[::3] = np.nan
  elif fault == 'uneven':
    z = np.concatenate([np.tile(z[:2], (2000, 1)), z[:K]])
  elif fault == 'few':
    z = z[: 4 * K]
  elif fault == 'elsewhere':
    z = 0.1 * z + 4
  return table, z


@pytest.mark.parametrize(
  'fault, section, keys',
  [
    ('none', EMA, ''),
    ('dead', EMA | dict(revive_below=0.0), 'model.quantizer.revive_below'),
    ('dead', EMA | dict(update='gradient'), 'model.quantizer.update'),
    ('dead', SIMVQ | dict(basis_init='normal'), 'model.quantizer.basis_init'),
    ('dead', SIMVQ, 'losses.entropy'),
    ('copies', EMA | dict(update='gradient'), 'losses.orthogonal'),
    ('copies', EMA, 'losses.entropy'),
    ('long', SIMVQ | dict(normalize=False), 'model.quantizer.normalize'),
    ('long', EMA, 'model.quantizer.distance'),
    ('elsewhere', EMA | dict(data_init=False), 'model.quantizer.data_init'),
    ('nan', EMA, 'optim.clip'),
    ('lost', EMA, 'model.dtype'),
    ('uneven', EMA, 'losses.entropy'),
    ('few', EMA, '--data'),
  ],
)
def test_findings_name_the_key(fault, section, keys):
  figures = codebooks.figures(stage_of(*planted(fault)), K)
  found = keys_of(built(**section), figures)
  assert keys in found if keys else not found
  json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
  'fault, section, key',
  [
    (
      'long',
      SIMVQ | dict(distance='cosine', normalize=False),
      'model.quantizer.normalize',
    ),
    (
      'dead',
      dict(
        name='grouped',
        groups=2,
        projection='mlp',
        quantizer=dict(name='fsq', levels=(8, 8)),
      ),
      'model.quantizer.projection',
    ),
    # Unit vectors, which an affine map does not take.
    ('long', EMA | dict(affine=True), 'model.quantizer.distance'),
    (
      'elsewhere',
      EMA | dict(data_init='kmeans++'),
      'model.quantizer.data_init',
    ),
  ],
)
def test_what_would_be_refused_or_worse_is_no_cure(fault, section, key):
  figures = codebooks.figures(stage_of(*planted(fault)), K)
  found = keys_of(built(**section), figures)
  assert found and key not in found


def test_a_key_that_is_set_is_not_named():
  figures = codebooks.figures(stage_of(*planted('dead')), K)
  assert 'model.quantizer.revive_below' not in keys_of(built(**EMA), figures)
  nested = dict(
    name='residual', stages=2, quantizer=EMA | dict(data_init=False)
  )
  keys = keys_of(built(**nested), figures)
  assert 'model.quantizer.quantizer.data_init' in keys
  assert 'losses.entropy' in keys


@pytest.mark.parametrize(
  'section, key',
  [
    (dict(name='fsq', levels=(8, 5, 4)), 'model.quantizer.projection'),
    (dict(name='fsq', levels=(8, 5, 4), projection='mlp'), 'losses.entropy'),
    (dict(name='lfq', bits=8), 'losses.entropy'),
    (dict(name='bsq', bits=8), 'losses.entropy'),
  ],
)
def test_levels_by_channel(section, key):
  """There is no table; one channel is stuck."""
  quantizer = built(**section)
  radix, rng = np.asarray(quantizer.levels), np.random.default_rng(0)
  digits = rng.integers(0, radix, (5000, len(radix)))
  digits[:, 1] = 1
  every = np.arange(quantizer.codebook_size)
  place = {
    tuple(d): i
    for i, d in enumerate(np.asarray(quantizer.digits(jnp.asarray(every))))
  }
  indices = np.array([place[tuple(d)] for d in digits])
  stage = stage_of(None, rng.normal(size=(5000, len(radix))), indices)
  figures = codebooks.figures(stage, len(every), quantizer)
  want = [
    np.bincount(d, minlength=r) / 5000
    for d, r in zip(digits.T, radix, strict=True)
  ]
  for a, b in zip(figures['levels'], want, strict=True):
    np.testing.assert_allclose(a, b)
  assert figures['levels_used'] == [*radix[:1], 1, *radix[2:]]
  assert 'near_duplicates' not in figures and 'margins' not in figures
  assert key in keys_of(quantizer, figures)


def test_unstable_indices_name_a_remedy():
  figures = codebooks.figures(stage_of(*healthy()), K)
  for what, key in {
    'bfloat16': 'model.dtype',
    'batch size, float32': 'a fixed batch size when tokenizing',
    'devices, bfloat16': 'precision',
  }.items():
    quantizer = built(**EMA).clone(dtype='bfloat16')
    found = keys_of(quantizer, figures | dict(moved={what: 0.05}))
    assert any(k.startswith(key) for k in found), what
  # A tokenizer in f32 does not compute in bf16.
  assert not keys_of(built(**EMA), figures | dict(moved={'bfloat16': 0.05}))


@pytest.mark.parametrize('kind', ('residual-shared', 'fsq-centered'))
def test_the_command(kind, tmp_path, monkeypatch, capsys):
  """A report and both files; the next table of the same tokenizer has NaN."""
  monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])
  photos = runs.images(tmp_path / 'photos', 20, 30)
  Image.fromarray(tiny.images(1, 9, 12)[0]).save(photos / 'small.png')
  (photos / 'broken.png').write_bytes(b'no image')
  tokenizer, variables = tiny.built(tiny.model(kind, depth=1))
  export.save_tokenizer(tokenizer, variables, tmp_path / 'tok')
  argv = [f'--tokenizer={tmp_path}/tok', f'--data={photos}', '--batch_size=4']
  doctor.main([*argv, f'--out={tmp_path}/out'])
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
    'doctor.json', 'doctor.png',
  }  # fmt: skip
  with Image.open(tmp_path / 'out' / 'doctor.png') as page:
    assert page.width > 800 and len(page.getcolors(1 << 20)) > 10
  report = json.loads((tmp_path / 'out' / 'doctor.json').read_text())
  assert (report['images'], report['skipped']) == (5, 1)
  assert [f['tokens'] for f in report['stages']] == [80] * len(report['stages'])
  out = capsys.readouterr().out
  assert 'effective bits' in out and 'findings' in out
  if kind == 'fsq-centered':
    assert report['stages'][0]['levels_used'] and not report['together']
    return
  assert [f['name'] for f in report['stages']] == ['stage 1', 'stage 2']
  (whole,) = report['together']
  assert whole['tokens'] == 160 and 'all codes of a token' in out
  # The file's table, which nothing computes again.
  leaves = variables['params']['quantizer']['parts']
  leaves['bias'] = leaves['bias'].at[0, 3].set(jnp.nan)
  export.save_tokenizer(tokenizer, variables, tmp_path / 'nan')
  doctor.main(
    [f'--tokenizer={tmp_path}/nan', *argv[1:], f'--png={tmp_path}/a.png']
  )
  assert 'NaN' in capsys.readouterr().out and (tmp_path / 'a.png').is_file()


def test_a_continuous_tokenizer_is_refused(tmp_path):
  export.save_tokenizer(
    *tiny.built(tiny.model('none', depth=1)), tmp_path / 'tok'
  )
  with pytest.raises(UserError, match='continuous') as error:
    doctor.main([f'--tokenizer={tmp_path}/tok', '--data=bundled:photos'])
  assert '\n' not in str(error.value)
