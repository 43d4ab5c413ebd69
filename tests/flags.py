"""XLA's flags for the suite, in every process of it.

Compiling is most of the suite's time: without LLVM's optimisations a step
compiles in .6 of it, without the emitters of fused loops in another .3, in one
piece in .85 of that. The formulas are the same, the last bit of a sine may not
be, and two programs may then round it apart. So tests that compare programs
bitwise compile as users do (`AS_USERS`).
"""

import jaxlib

# {option: (what the suite compiles with, what users have)}.
OPTIONS = {
  'xla_backend_optimization_level': ('0', 3),
  'xla_cpu_parallel_codegen_split_count': ('1', 32),
}
if tuple(map(int, jaxlib.__version__.split('.')[:2])) < (0, 11):
  OPTIONS['xla_cpu_use_fusion_emitters'] = ('false', True)
  # On a busy machine 8 devices meet late; XLA would end the process.
  OPTIONS['xla_cpu_collective_call_terminate_timeout_seconds'] = ('600', 40)

QUICK = ' '.join(f'--{name}={value}' for name, (value, _) in OPTIONS.items())
AS_USERS = {name: value for name, (_, value) in OPTIONS.items()}


def devices(count: int) -> str:
  """XLA_FLAGS of a process with so many fake devices."""
  return f'{QUICK} --xla_force_host_platform_device_count={count}'
