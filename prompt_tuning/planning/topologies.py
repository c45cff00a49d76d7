"""Devices that need not be there: TPU slices, and hosts with GPUs."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import os
import re
from typing import Any

from jax.experimental import topologies

from prompt_tuning.errors import UserError
from prompt_tuning.training import mesh_choice


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """What XLA's GPU compiler wants to know beside a `mesh_choice.Chip`."""

  kind: str
  capability: int
  multiprocessors: int
  l2_cache: int  # MiB
  shared_memory: int  # KiB of a multiprocessor
  clock: float  # GHz


# By NVIDIA's data sheets.
GPUS = {
  'a100_40gb': _Gpu('NVIDIA A100-SXM4-40GB', 8, 108, 40, 164, 1.41),
  'a100': _Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 40, 164, 1.41),
  'h100': _Gpu('NVIDIA H100 80GB HBM3', 9, 132, 50, 228, 1.98),
  'h200': _Gpu('NVIDIA H200', 9, 132, 50, 228, 1.98),
}
# Platform -> the package of its compiler, and what installs it here.
_COMPILERS = {'tpu': ('libtpu', 'tpu'), 'cuda': ('jax_cuda12_plugin', 'gpu')}


def topology_devices(name: str, num_slices: int = 1) -> Sequence[Any]:
  """The devices of a TPU slice, or of hosts with GPUs, that need not exist.

  Args:
    name: generation and chips along x, y (and z), as the Cloud writes it:
      'v5e:4x4', 'v4:2x2x4' (a device of v2 and v3 is a core, of later ones a
      chip); or a GPU and how many: 'h100:8', 'h100:2x8' for two hosts.
    num_slices: TPU slices of that shape, joined by the data-centre network.

  Raises:
    UserError: there is no such topology, or no compiler for it.
  """
  if name.partition(':')[0] in GPUS:
    settings = _gpus(name)
  else:
    settings = _tpus(name) | {'num_slices': num_slices}
  try:
    return list(topologies.get_topology_desc(**settings).devices)
  except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
    package, extra = _COMPILERS[settings['platform']]
    reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
    if importlib.util.find_spec(package) is None:
      reason = f'no {extra.upper()} compiler here: pip install'
      reason += f' "prompt_tuning[{extra}]"'
    raise UserError(f'TOPOLOGY {name!r}: {reason}') from error


def _tpus(name: str) -> dict[str, Any]:
  """What JAX asks of a TPU slice."""
  match = re.fullmatch(r'(\w+):(\d+)x(\d+)(?:x(\d+))?', name)
  if match is None:
    raise UserError(
      f'TOPOLOGY {name!r} is not a TPU generation and its chips, such as'
      f" 'v5e:4x4' or 'v4:2x2x2', nor a GPU ({', '.join(GPUS)}) and how many,"
      " such as 'h100:8'"
    )
  # Nothing of an attached TPU or of the Cloud's metadata is wanted, nor that
  # two compilations wait for each other.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '4')
  settings: dict[str, Any] = {'topology_name': name, 'platform': 'tpu'}
  if all(int(part or 1) == 1 for part in match.groups()[1:]):
    settings['chips_per_host_bounds'] = (1, 1, 1)
  if match[1] == 'v4':
    settings['chip_config_name'] = 'megacore'  # a chip is one device
  return settings


def _gpus(name: str) -> dict[str, Any]:
  """What JAX asks of hosts with GPUs."""
  match = re.fullmatch(r'(\w+):(?:(\d+)x)?(\d+)', name)
  if match is None:
    raise UserError(
      f"TOPOLOGY {name!r} is not a GPU and how many, such as 'h100:8' or"
      " 'h100:2x8' for two hosts"
    )
  # The plugin would else refuse a machine without a driver.
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  gpu = GPUS[match[1]]
  chip = mesh_choice.CHIPS[gpu.kind]
  # A text-format XLA `GpuTargetConfigProto`.
  target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      threads_per_core_limit: 2048 fpus_per_core: {64 * (gpu.capability - 7)}
      core_count: {gpu.multiprocessors} clock_rate_ghz: {gpu.clock}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {(gpu.shared_memory - 1) * 1024}
      shared_memory_per_core: {gpu.shared_memory * 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 l2_cache_size: {gpu.l2_cache * 2**20}
      memory_bandwidth: {int(chip.memory_bandwidth)}
      device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {gpu.capability} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{gpu.kind}"
  """
  return {
    'platform': 'cuda',
    'target_config': target,
    'topology': f'1x{match[2] or 1}x{match[3]}',
  }
