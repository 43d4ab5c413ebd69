"""Deliberate faults, each with the test that catches it.

A row replaces `old`, which must occur exactly once in `file`, by `new`; `test`
is the pytest node that then fails. `python -m tests.mutations` runs them. Keep
`old` short and on one line; a change that moves the code updates the row.
"""

from typing import NamedTuple


class Fault(NamedTuple):
  """One replacement in the code, and the test that fails then."""

  name: str
  file: str
  old: str
  new: str
  test: str


FAULTS = (
  # Losses and their gradients.
  Fault(
    'the adversarial gradient has the wrong sign',
    'vqrae_jax/train/step.py',
    'gan = weight * adaptive_weight * gan',
    'gan = -weight * adaptive_weight * gan',
    'tests/train/test_gan.py'
    '::test_the_weight_and_the_gradient_are_those_of_two_passes',
  ),
  Fault(
    'the generator loss has the wrong sign',
    'vqrae_jax/losses/adversarial.py',
    'return -fake.mean()',
    'return fake.mean()',
    'tests/losses/test_adversarial.py::test_losses_equal_torch[hinge]',
  ),
  Fault(
    'the commitment loss lacks its stop-gradient',
    'vqrae_jax/quantizers/base.py',
    '(surrogate - jax.lax.stop_gradient(codes)) ** 2',
    '(surrogate - codes) ** 2',
    'tests/quantizers/test_gradients.py'
    '::test_each_loss_moves_its_own_side[vq-gradient]',
  ),
  Fault(
    'the commitment and codebook losses are swapped',
    'vqrae_jax/losses/__init__.py',
    "'commit': commit, 'codebook': codebook",
    "'commit': codebook, 'codebook': commit",
    'tests/train/test_step.py::test_gradients_equal_one_loss[simvq-l2]',
  ),
  Fault(
    'self-distillation moves the encoder',
    'vqrae_jax/losses/latent.py',
    'latents = jax.lax.stop_gradient(latents)',
    'latents = jnp.asarray(latents)',
    'tests/train/test_initialize.py::test_both_targets_by_hand',
  ),
  Fault(
    'self-distillation passes straight through the codes',
    'vqrae_jax/losses/latent.py',
    'out.z_q if out.quantized is None else out.quantized',
    'out.z_q',
    'tests/train/test_initialize.py'
    '::test_self_moves_codes_and_the_way_back_from_them_alone[vq-gradient]',
  ),
  Fault(
    'the teacher moves with the encoder',
    'vqrae_jax/train/step.py',
    "variables = {'params': frozen.teacher}",
    "variables = {'params': trees.unflatten(state.tokenizer.params)}",
    'tests/train/test_initialize.py'
    '::test_the_teacher_is_the_encoder_that_init_from_gives',
  ),
  Fault(
    'LPIPS takes images in [0, 1] for [-1, 1]',
    'vqrae_jax/losses/perceptual.py',
    'image_ops.normalize(2 * images - 1, _SHIFT, _SCALE)',
    'image_ops.normalize(images, _SHIFT, _SCALE)',
    'tests/losses/test_perceptual.py::test_lpips',
  ),
  Fault(
    'a loss starts one step late',
    'vqrae_jax/optim.py',
    "- numbers['start'] + 1",
    "- numbers['start']",
    'tests/train/test_step.py'
    '::test_a_loss_weight_starts_and_rises_when_its_config_says',
  ),
  # Quantizers.
  Fault(
    'SimVQ looks codes up in the basis without its projection',
    'vqrae_jax/quantizers/base.py',
    'return self._table()[indices]',
    "return self.get_variable('codebook', 'basis')[indices]",
    'tests/quantizers/test_gradients.py'
    '::test_each_loss_moves_its_own_side[simvq-l2]',
  ),
  Fault(
    'FSQ lacks the shift of even levels',
    'vqrae_jax/quantizers/fsq.py',
    'jnp.tanh(z + shift)',
    'jnp.tanh(z)',
    'tests/quantizers/test_fsq.py::test_cosmos_is_the_papers_formula',
  ),
  Fault(
    'the order of the FSQ digits is reversed',
    'vqrae_jax/quantizers/fsq.py',
    "last_is_least=self.convention == 'centered'",
    "last_is_least=self.convention != 'centered'",
    'tests/quantizers/test_fsq.py::test_index_order',
  ),
  Fault(
    'the straight-through value is rounded',
    'vqrae_jax/ops/codes.py',
    'return sg(codes) + (surrogate - sg(surrogate))',
    'return surrogate + sg(codes - surrogate)',
    'tests/quantizers/test_gradients.py::test_straight_through_is_exact_in_bf16',
  ),
  Fault(
    'the nearest code has the wrong sign in its distance',
    'vqrae_jax/ops/codes.py',
    'jnp.argmin(half_norms - dots, axis=-1)',
    'jnp.argmin(half_norms + dots, axis=-1)',
    'tests/ops/test_codes.py::test_equal_distances_go_to_the_lowest_index',
  ),
  Fault(
    'the EMA codebook decays the wrong side',
    'vqrae_jax/quantizers/vq.py',
    "sums = g * codebook['sums'] + (1 - g) * stats['sums'][0]",
    "sums = (1 - g) * codebook['sums'] + g * stats['sums'][0]",
    'tests/quantizers/test_codebooks.py::test_ema_update_is_the_formula',
  ),
  Fault(
    'decode_from_indices skips post_quant',
    'vqrae_jax/models/tokenizer.py',
    'return self.decode_codes(self.quantizer.indices_to_codes(indices))[0]',
    'return self.decoder(self.latents.inverse(self.quantizer.from_code_space('
    'self.quantizer.indices_to_codes(indices))))[0]',
    'tests/test_inference.py::test_decoding_indices_is_reconstruct',
  ),
  Fault(
    'the decoder reads normalised latents',
    'vqrae_jax/models/tokenizer.py',
    'z_q = self.latents.inverse(self.quantizer.codes_to_latents(codes))',
    'z_q = self.quantizer.codes_to_latents(codes)',
    'tests/models/test_latents.py'
    '::test_only_the_quantizer_sees_normalised_latents[channel]',
  ),
  # The adversary.
  Fault(
    'the adaptive weight is inverted',
    'vqrae_jax/losses/adversarial.py',
    'jnp.clip(norm_rec / (norm_gan + eps)',
    'jnp.clip(norm_gan / (norm_rec + eps)',
    'tests/losses/test_adversarial.py::test_the_weight_is_clipped',
  ),
  Fault(
    'the adaptive weight is of each microbatch',
    'vqrae_jax/train/step.py',
    'hparams, images, sample_ids, adaptive_weight\n',
    'hparams, images, sample_ids\n',
    'tests/train/test_gan.py::test_accumulation_is_one_big_batch[False]',
  ),
  Fault(
    'head_gradient lacks the std of the pixel norm',
    'vqrae_jax/losses/adversarial.py',
    'cotangent.astype(jnp.float32) * jnp.asarray(std, jnp.float32)',
    'cotangent.astype(jnp.float32)',
    'tests/losses/test_adversarial.py::test_head_gradient_is_autograds',
  ),
  Fault(
    'the discriminator sees unrounded, unclipped reconstructions',
    'vqrae_jax/train/step.py',
    'fakes = adversarial.to_8_bits(recon)',
    'fakes = recon',
    'tests/train/test_gan.py::test_the_discriminator_learns_on_8_bits',
  ),
  Fault(
    'reconstructions are cut to 8 bits instead of rounded',
    'vqrae_jax/losses/adversarial.py',
    'jnp.round(jnp.clip(images, 0.0, 1.0) * 255)',
    'jnp.floor(jnp.clip(images, 0.0, 1.0) * 255)',
    'tests/losses/test_adversarial.py::test_eight_bits',
  ),
  Fault(
    'LeCam compares real logits with their own average',
    'vqrae_jax/losses/adversarial.py',
    "jax.nn.relu(real - state['fake'])",
    "jax.nn.relu(real - state['real'])",
    'tests/losses/test_adversarial.py::test_lecam_over_three_steps',
  ),
  Fault(
    'the LeCam averages of real and fake are swapped',
    'vqrae_jax/train/gan.py',
    "metrics['logits/real'], metrics['logits/fake']\n",
    "metrics['logits/fake'], metrics['logits/real']\n",
    'tests/train/test_gan.py::test_both_networks_move_and_have_metrics',
  ),
  Fault(
    'spectral norm advances once per microbatch',
    'vqrae_jax/train/gan.py',
    "spectral = advance(network.params, network.stats['spectral'])",
    "spectral = network.stats['spectral']\n"
    '    for _ in batch[0]:\n'
    '      spectral = advance(network.params, spectral)',
    'tests/train/test_gan.py::test_accumulation_is_one_big_batch[True]',
  ),
  Fault(
    'DiffAug draws the same for all samples',
    'vqrae_jax/ops/augment.py',
    'jax.random.uniform(jax.random.fold_in(key, index), (7,))',
    'jax.random.uniform(jax.random.fold_in(key, 0 * index), (7,))',
    'tests/ops/test_augment.py'
    '::test_draws_are_each_samples_own_and_span_their_ranges',
  ),
  Fault(
    'DiffAug draws the same at every step',
    'vqrae_jax/train/gan.py',
    'jax.random.fold_in(jax.random.fold_in(state.rng, state.step), use)',
    'jax.random.fold_in(state.rng, use)',
    'tests/train/test_golden.py::test_figures[encoder frozen, LPIPS and GAN]',
  ),
  # The step.
  Fault(
    'accumulation sums gradients and losses',
    'vqrae_jax/train/gan.py',
    'lambda x: x / count, means',
    'lambda x: x, means',
    'tests/train/test_step.py::test_accumulation_is_one_big_batch[vq-ema]',
  ),
  Fault(
    'the codebook is updated twice with microbatches',
    'vqrae_jax/train/step.py',
    "codebook = codebook | {'quantizer': updated}",
    "codebook = codebook | {'quantizer': updated if spec.accumulate == 1 else "
    'spec.tokenizer.quantizer.update_codebook(updated, stats)}',
    'tests/train/test_step.py::test_accumulation_is_one_big_batch[vq-ema]',
  ),
  Fault(
    'the EMA follows the updates instead of the weights',
    'vqrae_jax/train/step.py',
    '(p - e)), ema, params',
    '(p - e)), ema, updates',
    'tests/train/test_step.py::test_ema_follows_the_weights',
  ),
  Fault(
    'the EMA has no warm-up',
    'vqrae_jax/train/step.py',
    "jnp.minimum(hparams['ema'], (1 + t) / (10 + t))",
    "hparams['ema']",
    'tests/train/test_step.py::test_ema_follows_the_weights',
  ),
  Fault(
    'usage is counted over a batch instead of the window',
    'vqrae_jax/train/step.py',
    'window = usage.sum(0)',
    "window = stats['counts']",
    'tests/train/test_step.py::test_usage_counts_the_last_steps_only',
  ),
  Fault(
    'a non-finite step is kept in the EMA',
    'vqrae_jax/train/step.py',
    'return jax.tree.map(chosen, before, after), skipped',
    'return jax.tree.map(chosen, before, after).replace(\n'
    '    ema=after.ema), skipped',
    'tests/train/test_gan.py'
    '::test_a_nonfinite_step_moves_nothing_but_its_counter',
  ),
  Fault(
    'the noise on latents is the same at every step',
    'vqrae_jax/train/step.py',
    'jax.random.fold_in(key, _NOISE)',
    'jax.random.fold_in(state.rng, _NOISE)',
    'tests/train/test_step.py'
    '::test_noise_is_added_before_quantising_and_only_there',
  ),
  # Schedules and frozen leaves.
  Fault(
    'weight decay moves frozen blocks',
    'vqrae_jax/optim.py',
    'return jnp.where(_per_block(moves, u), factors * u, -0.0)',
    'return jnp.where(_per_block(moves, u), factors, 1.0) * u',
    'tests/test_optim.py::test_vector_schedules_over_stacked_blocks',
  ),
  Fault(
    'gradients of frozen blocks count in the clipped norm',
    'vqrae_jax/optim.py',
    'lambda grads, _: self.mask_frozen_layers(grads)',
    'lambda grads, _: grads',
    'tests/test_optim.py::test_frozen_slices_do_not_count_in_the_clipped_norm',
  ),
  Fault(
    'weight decay acts on biases',
    'vqrae_jax/optim.py',
    "return last in ('kernel', 'codes') and leaf.ndim > 1",
    "return last in ('kernel', 'codes', 'bias') and leaf.ndim > 1",
    'tests/test_optim.py::test_equals_optax_adamw',
  ),
  Fault(
    'frozen leaves enter the EMA',
    'vqrae_jax/train/state.py',
    'ema=jax.tree.map(jnp.copy, params) if spec.ema',
    "ema=trees.flatten(variables['params']) if spec.ema",
    'tests/train/test_step.py'
    '::test_a_frozen_encoder_has_no_optimizer_state_and_no_average',
  ),
  Fault(
    'the first step of a warm-up has a rate of zero',
    'vqrae_jax/optim.py',
    'jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)',
    'jnp.minimum(step / jnp.maximum(warmup, 1), 1.0)',
    'tests/test_optim.py::test_rates',
  ),
  # Data.
  Fault(
    'the last sample of an epoch is drawn from the next',
    'vqrae_jax/data/pipeline.py',
    'permutation(i // n)',
    'permutation((i + 1) // n)',
    'tests/data/test_pipeline.py'
    '::test_each_epoch_sees_every_image_once_in_a_new_order[7]',
  ),
  Fault(
    'hosts read the wrong slice of the global batch',
    'vqrae_jax/data/pipeline.py',
    'self._first, self._stride = process_index, process_count',
    'self._first, self._stride = process_count - 1 - process_index, '
    'process_count',
    'tests/data/test_pipeline.py'
    '::test_hosts_take_slices_of_one_global_batch[2]',
  ),
  # Checkpoints and resuming.
  Fault(
    'files in subfolders of a checkpoint are not hashed',
    'vqrae_jax/train/checkpoint.py',
    "found |= {f'{path.name}/{n}': p for n, p in _files(path).items()}",
    'continue',
    'tests/train/test_checkpoint.py'
    '::test_damage_falls_back_to_the_step_before[a flipped bit]',
  ),
  Fault(
    'a resumed run ignores the saved key',
    'vqrae_jax/train/checkpoint.py',
    'return jax.random.wrap_key_data(leaves[name])',
    'return jax.random.key(0)',
    'tests/train/test_run.py::test_a_resumed_run_is_the_uninterrupted_one',
  ),
  Fault(
    'a resumed run restarts its schedules',
    'vqrae_jax/train/checkpoint.py',
    'return leaves[name]\n',
    "return leaves[name] * (not name.endswith('schedule_count'))\n",
    'tests/train/test_run.py::test_a_resumed_run_is_the_uninterrupted_one',
  ),
  Fault(
    'a resumed run restarts its data',
    'vqrae_jax/train/loop.py',
    'setup.batches.iterate(position.step)',
    'setup.batches.iterate(0)',
    'tests/train/test_run.py::test_a_resumed_run_is_the_uninterrupted_one',
  ),
  # Files of tokenizers and of others.
  Fault(
    'the fingerprint ignores shapes',
    'vqrae_jax/export.py',
    "f'\\n{name} {list(leaf.shape)}\\n'",
    "f'\\n{name}\\n'",
    'tests/test_export.py::test_the_fingerprint_is_pinned',
  ),
  Fault(
    'a weight table cuts value, key, query instead of q, k, v',
    'vqrae_jax/encoders/internvit.py',
    "naming.dense(f'{layer}attn.qkv', _QKV)",
    "naming.dense(f'{layer}attn.qkv', _QKV[::-1])",
    'tests/encoders/test_parity_tiny.py'
    '::test_internvit_under_its_authors_names[internvit-300m]',
  ),
  Fault(
    'position embeddings are resampled without antialias',
    'vqrae_jax/models/encoder.py',
    's, spec.posemb_resize, spec.posemb_antialias, name=',
    's, spec.posemb_resize, False, name=',
    'tests/encoders/test_parity_tiny.py::test_parity[dinov2-registers]',
  ),
)
