"""Writes metrics.json: the figures of three steps of the runs in `RUNS`; and
costs.json: FLOPs and bytes of temporaries of these compiled steps.

    python -m tests.golden.make_metrics

Renew it when a change is meant to alter what a step computes (a loss, the
optimizer, initialisation, a codebook's update), in the same commit, and say in
its message which figures moved and why. A change that is meant to keep the
computation (speed, layout, names, another release of JAX) must pass without;
if it does not, find the cause.

The run is chosen so that rounding cannot grow. Adam divides a gradient by its
own size: where the true gradient is zero (the bias of attention's keys, which
softmax does not see) it makes ±1 of rounding errors. An eps of 1e-3, above
all such errors and below the gradients that count, keeps them as small as
they are. Positions are made 50 times larger, so that tokens differ and many
codes occur, and are far from ties. The rate of 1e-2 moves the losses by
percents, the clip and the weight decay act in every step, and the weights'
average decays by .2, which its warm-up reaches in three steps.

With a discriminator two more things would make rounding errors grow, shown by
compiling with and without LLVM's optimisations. Of a nearly flat image VGG's
maxima are nearly ties and PatchGAN's group norms divide by nearly nothing
(2e-5 in the first gradient), so the decoder's head is 5 times larger; and a
value between two levels of 8 bits falls to either (7e-4 in the discriminator's
third gradient), so here it sees its fakes clipped and unrounded. With both, the
two programs agree to 5e-6.
"""

import functools
import json
import math
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests import conftest, tiny  # noqa: F401, the suite's flags come first
from tests.train import pieces
from vqrae_jax import programs
from vqrae_jax.losses import adversarial
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

PATH = pathlib.Path(__file__).with_name('metrics.json')
COSTS = pathlib.Path(__file__).with_name('costs.json')
RATE = dict(lr=1e-2, end_lr=1e-3, warmup=2)
OPTIM = dict(b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip=0.1)

# {name: (quantizer, what its config has more)}. The runs of `tests/contract`
# pin the other quantizers.
RUNS = {
  'vq-gradient': ('vq-gradient', {}),
  'simvq-cosine': ('simvq-cosine', {}),
  'encoder frozen, LPIPS and GAN': (
    'vq-ema',
    dict(
      # The decoder hears of the discriminator a step after that begins to
      # learn.
      discriminator=pieces.PATCH | dict(schedule=RATE, optim=OPTIM),
      init=dict(networks='random'),
      losses=tiny.LOSSES['vq-ema']
      | dict(lpips=0.5, gan=dict(weight=0.5, start=1)),
      schedules=(('encoder/.*', None), ('.*', RATE)),
    ),
  ),
}


@functools.cache
@mock.patch.object(adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0, 1))
def begun(name: str):
  """(plan, state, frozen, the traced step, the compiled one) of a run, whose
  state is that of seed 0."""
  kind, more = RUNS[name]
  base = dict(schedules=(('.*', RATE),), optim=OPTIM, ema=0.2)
  plan = pieces.planned(kind, **base | dict(log=dict(usage_window=2)) | more)
  second = pieces.CONTRAST if plan.spec.gan else {}
  own = functools.partial(state_lib.sharded_state, seed=0)
  state, frozen = pieces.started(plan, larger=pieces.APART | second, draw=own)
  step = functools.partial(step_lib.train_step, plan.spec)
  traced = jax.jit(step, donate_argnums=0).trace(
    state, frozen, plan.hparams, tiny.images(8)
  )
  return plan, state, frozen, traced, traced.lower().compile()


def figures(name: str) -> dict[str, list[float]]:
  """{metric: its value at each step}; "ema_gap" is |average - weights|."""
  plan, state, frozen, _, step = begun(name)
  state, rows = jax.tree.map(jnp.copy, state), []
  for i in range(3):
    state, metrics = step(state, frozen, plan.hparams, tiny.images(8, seed=i))
    assert not metrics.pop('nonfinite')
    metrics |= plan.update_norms(state)
    ema, params = jax.device_get((state.ema, state.tokenizer.params))
    squares = sum(np.square(ema[n] - params[n]).sum() for n in ema)
    rows.append(metrics | {'ema_gap': math.sqrt(squares)})
  # Nine digits are all of an f32.
  return {
    name: [float(f'{float(row[name]):.9g}') for row in rows]
    for name in sorted(rows[0])
  }


def costs(name: str) -> dict[str, float]:
  """What the compiled step costs, of each microbatch as often as it runs."""
  *_, traced, step = begun(name)
  used = step.memory_analysis().temp_size_in_bytes
  flops = sum(p.flops for p in programs.products(traced.jaxpr.jaxpr))
  return {'flops': flops, 'temporaries': used}


if __name__ == '__main__':
  found = {name: figures(name) for name in RUNS}
  PATH.write_text(json.dumps(found, indent=1) + '\n')
  found = {name: costs(name) for name in RUNS}
  COSTS.write_text(json.dumps(found, indent=1) + '\n')
