"""Prompts as .npy and .safetensors files."""

import pickle
import resource

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning.errors import UserError
from prompt_tuning.interop.prompts import load_prompt
from prompt_tuning.interop.prompts import load_trained
from prompt_tuning.interop.prompts import save_prompt

METADATA = {
  'base': 't5_1_1_mini',
  'base_fingerprint': '0123456789abcdef',
  'task': 'bbc',
  'step': 1_100_300,
  'metric': 'bbc/accuracy',
  'metric_value': 93.25,
  'placement': None,
}


def table_of(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape', [(1, 5, 8), (3, 5, 8)])
def test_both_files_give_the_table_back(tmp_path, shape):
  table = table_of(*shape)
  npy, tensors = save_prompt(tmp_path / 'export', table, METADATA)
  assert (npy.name, tensors.name) == ('prompt.npy', 'prompt.safetensors')
  for path in (npy, tensors, tmp_path / 'export'):
    loaded, _ = load_prompt(path)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, table)
  # One prompt is a plain [P, E] file, as public prompts are.
  stored = np.load(npy, allow_pickle=False)
  assert stored.shape == (shape[1:] if shape[0] == 1 else shape)


def test_metadata_names_the_base_and_the_shape(tmp_path):
  save_prompt(tmp_path, table_of(1, 5, 8), METADATA)
  _, metadata = load_prompt(tmp_path)
  versions = {k: metadata.pop(k) for k in list(metadata) if 'version' in k}
  assert metadata == {
    'base': 't5_1_1_mini',
    'base_fingerprint': '0123456789abcdef',
    'task': 'bbc',
    'step': 1_100_300,
    'metric': 'bbc/accuracy',
    'metric_value': 93.25,
    'num_prompts': 1,
    'prompt_length': 5,
    'embed': 8,
    'placement': 'prefix',
  }
  assert set(versions) == {'prompt_tuning_version', 'jax_version'}


def test_two_dimensional_and_bfloat16_files_are_read(tmp_path):
  table = table_of(5, 8)
  np.save(tmp_path / 'a.npy', table)
  loaded, metadata = load_prompt(tmp_path / 'a.npy')
  np.testing.assert_array_equal(loaded, table[None])
  assert metadata == {}
  half = table.astype(ml_dtypes.bfloat16)
  safetensors.numpy.save_file({'prompt': half}, tmp_path / 'b.safetensors')
  loaded, _ = load_prompt(tmp_path / 'b.safetensors')
  np.testing.assert_array_equal(loaded, half.astype(np.float32)[None])


def test_public_prompts_are_read(shared_dir):
  for path in sorted((shared_dir / 'data/prompts').glob('*.npy')):
    table, _ = load_prompt(path)
    assert table.shape == (1, 100, 768)


def refused(path, *words):
  with pytest.raises(UserError) as fault:
    load_prompt(path)
  message = str(fault.value)
  assert '\n' not in message
  for word in (path.name, *words):
    assert word in message, message


def test_damaged_files_are_named(tmp_path):
  for path in save_prompt(tmp_path, table_of(1, 5, 8), METADATA):
    content = path.read_bytes()
    for cut in (0, 1, 7, 40, len(content) - 1):
      path.write_bytes(content[:cut])
      refused(path, 'damaged')
    path.write_bytes(b'\xff' * len(content))
    refused(path, 'damaged')


def test_files_are_never_unpickled(tmp_path):
  class Bomb:
    def __reduce__(self):
      return (pytest.fail, ('unpickled',))

  (tmp_path / 'bare.npy').write_bytes(pickle.dumps(Bomb()))
  refused(tmp_path / 'bare.npy', 'damaged')
  array = np.empty((1, 2), object)
  array[:] = Bomb()
  np.save(tmp_path / 'object.npy', array, allow_pickle=True)
  refused(tmp_path / 'object.npy', 'damaged')


@pytest.mark.parametrize(
  'array',
  [
    np.zeros(8),
    np.zeros((1, 1, 5, 8)),
    np.zeros((5, 0)),
    np.zeros((5, 8), int),
  ],
  ids=['rank 1', 'rank 4', 'empty', 'integers'],
)
def test_other_shapes_and_types_are_refused(tmp_path, array):
  np.save(tmp_path / 'p.npy', array)
  refused(tmp_path / 'p.npy', str(list(array.shape)), '[length, embed]')


def test_values_that_are_not_finite_are_refused(tmp_path):
  table = table_of(1, 5, 8)
  table[0, 1, 2:4] = np.nan, np.inf
  np.save(tmp_path / 'p.npy', table)
  refused(tmp_path / 'p.npy', '2 values that are not finite')
  with pytest.raises(UserError, match='not finite'):
    save_prompt(tmp_path / 'out', table, {})


def test_absent_and_foreign_files_are_refused(tmp_path):
  refused(tmp_path / 'absent.npy', 'no prompt at')
  (tmp_path / 'p.txt').write_text('0.1 0.2')
  refused(tmp_path / 'p.txt', '.npy or .safetensors')
  (tmp_path / 'empty').mkdir()
  refused(tmp_path / 'empty', 'no prompt in')
  two = {'a': np.zeros((2, 2), np.float32), 'b': np.zeros((2, 2), np.float32)}
  safetensors.numpy.save_file(two, tmp_path / 'two.safetensors')
  refused(tmp_path / 'two.safetensors', '2 arrays')


def test_full_disk_keeps_the_earlier_export(tmp_path):
  earlier = table_of(1, 5, 8)
  save_prompt(tmp_path, earlier, METADATA)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    with pytest.raises(UserError, match='cannot write .*prompt'):
      save_prompt(tmp_path, table_of(1, 100, 768), METADATA)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['prompt.npy', 'prompt.safetensors']
  for name in names:
    np.testing.assert_array_equal(load_prompt(tmp_path / name)[0], earlier)


def test_prompts_of_a_list_are_one_table(tmp_path):
  for k, rows in enumerate((2, 2, 3)):
    table = np.full((rows, 4), k, np.float32)
    facts = {'base': 'b', 'step': 10 + k, 'seed': k}
    save_prompt(tmp_path / f'{k}', table, facts)
  (found,) = load_trained([str(tmp_path / '0'), str(tmp_path / '1')])
  assert found.method.num_prompts == 2 and found.method.length == 2
  np.testing.assert_array_equal(found.arrays['table'][:, 0, 0], [0, 1])
  assert found.facts['base'] == 'b' and 'seed' not in found.facts
  with pytest.raises(UserError, match='2 has length 3, .*/0 has 2'):
    load_trained([str(tmp_path / '0'), str(tmp_path / '2')])
  with pytest.raises(UserError, match='an empty list'):
    load_trained([])
