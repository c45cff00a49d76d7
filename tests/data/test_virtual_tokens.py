import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning.data.virtual_tokens import VirtualTokens
from prompt_tuning.data.virtual_tokens import encoder_row
from prompt_tuning.errors import UserError


def test_ids_of_prompt_k_start_after_those_of_the_prompts_before_it():
  virtual = VirtualTokens(first_id=100, length=3, num_prompts=2)
  np.testing.assert_array_equal(virtual.ids(), [100, 101, 102])
  np.testing.assert_array_equal(virtual.ids(1), [103, 104, 105])


@pytest.mark.parametrize(
  ('placement', 'with_eos', 'without_eos'),
  [
    ('prefix', [100, 101, 102, 7, 8, 9, 1], [100, 101, 102, 7, 8, 9]),
    ('after_bos', [7, 100, 101, 102, 8, 9, 1], [7, 100, 101, 102, 8, 9]),
    ('suffix', [7, 8, 9, 100, 101, 102, 1], [7, 8, 9, 100, 101, 102]),
    ('around', [100, 7, 8, 9, 101, 102, 1], [100, 7, 8, 9, 101, 102]),
  ],
)
def test_each_placement_puts_the_virtual_tokens_where_it_says(
  placement, with_eos, without_eos
):
  virtual = VirtualTokens(100, 3, placement=placement)
  placed = virtual.place(np.array([7, 8, 9, 1]), virtual.ids())
  np.testing.assert_array_equal(placed, with_eos)
  placed = virtual.place(np.array([7, 8, 9]), virtual.ids())
  np.testing.assert_array_equal(placed, without_eos)


def test_a_row_is_trimmed_so_that_eos_fits_and_padded_to_its_length():
  virtual = VirtualTokens(100, 2, placement='suffix')
  row = encoder_row([5, 6, 7, 8, 9], 4, virtual)
  np.testing.assert_array_equal(row, [5, 6, 7, 100, 101, 1])
  assert row.dtype == np.int32
  np.testing.assert_array_equal(
    encoder_row([5], 4, virtual), [5, 100, 101, 1, 0, 0]
  )
  np.testing.assert_array_equal(encoder_row([5], 4), [5, 1, 0, 0])


def test_a_text_without_tokens_still_gets_its_prompt():
  virtual = VirtualTokens(100, 2, placement='around')
  np.testing.assert_array_equal(encoder_row([], 2, virtual), [100, 101, 1, 0])


def test_faults_name_the_setting_and_what_it_takes():
  with pytest.raises(UserError, match="prefix, after_bos.*got 'middle'"):
    VirtualTokens(100, 2, placement='middle')
  with pytest.raises(UserError, match='length of 1 or more, got 0'):
    VirtualTokens(100, 0)
  with pytest.raises(UserError, match='asks for prompt 2'):
    VirtualTokens(100, 2, num_prompts=2).ids(2)


def test_placing_virtual_tokens_and_naming_a_task_need_no_tensorflow():
  code = (
    'import sys\n'
    'import prompt_tuning.data.virtual_tokens\n'
    'import prompt_tuning.data.task_data\n'
    'import prompt_tuning.data.records\n'
    'loaded = {"tensorflow", "seqio"} & set(sys.modules)\n'
    'assert not loaded, loaded\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
