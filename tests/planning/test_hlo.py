"""Reading a compiled program: small ones by hand, and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning.models import attention_kernel
from prompt_tuning.planning import hlo

# A loop of three runs in the notation of XLA for TPU: a fused reduction, an
# asynchronous gather, a slice of a stack of layers (in other tiles, as of 8-bit
# kernels), on-chip memory S(1).
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%other_tiles (q0: f32[3,4,8]) -> f32[3,4,8] {
  %q0 = f32[3,4,8]{2,1,0} parameter(0)
  ROOT %copied = f32[3,4,8]{2,1,0:T(8,128)} copy(%q0)
}

%fused_slice (p0: f32[3,4,8], p1: s32[]) -> f32[4,8] {
  %p0 = f32[3,4,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %relaid = f32[3,4,8]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%other_tiles
  %part = f32[1,4,8]{2,1,0} dynamic-slice(%relaid, %p1, %zero, %zero)
  ROOT %flat = f32[4,8]{1,0} bitcast(%part)
}

%body (t: (s32[], f32[4,8], f32[3,4,8])) -> (s32[], f32[4,8], f32[3,4,8]) {
  %t = (s32[], f32[4,8]{1,0}, /*index=2*/f32[3,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %stack = f32[3,4,8]{2,1,0} get-tuple-element(%t), index=2
  %layer = f32[4,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %y = f32[4,8]{1,0:T(8,128)S(1)} add(%x, %layer)
  %sum = f32[4,8]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/layer"}
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) tuple(%i, %sum, %stack)
}

%condition (t: (s32[], f32[4,8], f32[3,4,8])) -> pred[] {
  %t = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (x: f32[4,8], stack: f32[3,4,8]) -> f32[32,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %stack = f32[3,4,8]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) tuple(%zero, %x, %stack)
  %loop = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %sent = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %all = f32[32,8]{1,0} all-gather-done(%sent)
  %part = bf16[4,8]{1,0} reduce-scatter(%all), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  ROOT %moved = f32[32,8]{1,0} collective-permute(%all), channel_id=4, source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loop_runs():
  found = {one.kind: one for one in hlo.collectives(PROGRAM)}
  reduced = found['all-reduce']
  assert (reduced.bytes, reduced.group, reduced.count) == (128, 4, 3)
  assert reduced.name == 'jit(step)/layer'
  gathered = found['all-gather']
  assert (gathered.bytes, gathered.group, gathered.count) == (1024, 8, 1)
  # Of a reduce-scatter, what goes in: four parts of 64 bytes.
  assert (found['reduce-scatter'].bytes, found['reduce-scatter'].group) == (
    256,
    4,
  )
  assert found['collective-permute'].bytes == 1024
  assert hlo.by_kind(list(found.values()))['all-reduce'] == (3, 384)


def test_bytes_on_the_wire_are_those_of_a_ring():
  wire = {one.kind: one.wire_bytes for one in hlo.collectives(PROGRAM)}
  assert wire == {
    'all-reduce': 2 * 128 * 3 / 4,
    'all-gather': 1024 * 7 / 8,
    'reduce-scatter': 256 * 3 / 4,
    'collective-permute': 1024,
  }


def test_memory_traffic_takes_slices_for_what_they_are():
  # A run of the loop: a layer of the stack read (128) and written (128), it and
  # x read for a sum that stays on the chip (256), whose reduction is written
  # (128). After it: the gather reads 128 and its pair of buffers counts as
  # written (128 + 1024), the scatter reads 1024 and writes 64, the last one
  # reads and writes 1024.
  loop = 3 * (128 + 128 + 256 + 128)
  after = 128 + 1152 + 1024 + 64 + 2 * 1024
  # The index of the slice is read too, four bytes a run.
  assert hlo.bytes_accessed(PROGRAM) == loop + 3 * 4 + after


def test_counts_of_xla_and_of_this_package_agree_where_both_can_be_right():
  """A program without loops, on one device."""

  def step(x, w):
    return jnp.sum(jnp.tanh(x @ w))

  traced = jax.jit(jax.grad(step)).trace(
    jnp.zeros((64, 32)), jnp.zeros((32, 16))
  )
  compiled = traced.lower().compile()
  flops = hlo.count_flops(traced.jaxpr)
  # Two products of 64 x 32 x 16: x's gradient, and the one it needs first.
  assert flops == 2 * 2 * 64 * 32 * 16
  costs = compiled.cost_analysis()
  assert costs['flops'] >= flops
  text = compiled.as_text()
  assert hlo.collectives(text) == []
  np.testing.assert_allclose(
    hlo.bytes_accessed(text), costs['bytes accessed'], rtol=0.25
  )


def test_a_scan_counts_every_layer():
  def run(x, layers):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

  x, layers = jnp.zeros((8, 8)), jnp.zeros((5, 8, 8))
  traced = jax.jit(run).trace(x, layers)
  assert hlo.count_flops(traced.jaxpr) == 5 * 2 * 8**3
  text = traced.lower().compile().as_text()
  # Every layer is read once: more than the stack, less than twice the rest.
  moved = hlo.bytes_accessed(text)
  assert layers.nbytes < moved < 20 * layers.nbytes


def test_products_of_a_kernel_are_those_of_all_its_blocks():
  x, ids = jnp.ones((2, 20, 3, 8)), jnp.ones((2, 20), jnp.int32)
  jaxpr = jax.make_jaxpr(
    lambda x, ids: attention_kernel.attention(
      *(x, x, x, None, ids, ids), block_q=8, block_k=8, interpret=True
    )
  )(x, ids)
  assert hlo.count_flops(jaxpr) == 2 * 2 * 2 * 3 * 24 * 24 * 8
