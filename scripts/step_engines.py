"""The engines of benchmark.py: each makes a callable that does one step.

A new engine is a function from the `Work` to a `Step`, and an entry of ENGINES.
Before one runs nothing but the standard library is imported.
"""

from collections.abc import Callable
import dataclasses
import functools
import resource
import sys
import time
import types
from typing import Any

WORKS = ('train', 'score', 'generate')


@dataclasses.dataclass
class Work:
  """What every engine is to do, on random weights and full rows.

  Attributes:
    kind: of WORKS: a step of training a prompt, the log-likelihoods of given
      targets, or greedy decoding of `targets` tokens.
    sizes: those of `T5Config`: a gated T5 1.1 with an output layer of its own.
    batch: rows B.
    inputs: ids of text in a row.
    prompt: P, virtual tokens in a row.
    targets: ids of the targets.
    dtype: of activations and frozen weights.
    microbatches: parts that our engines take a batch in; None: their own rule.
    lengths: ids of text of each row, at most `inputs`; None: rows are full.
  """

  kind: str
  sizes: dict[str, Any]
  batch: int
  inputs: int
  prompt: int
  targets: int
  dtype: str
  microbatches: int | None = None
  lengths: list[int] | None = None

  def rows(self) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the inputs and of the targets: made up, in the vocabulary."""
    lengths = self.lengths or [self.inputs] * self.batch
    vocabulary = self.sizes['vocab_size']
    made = lambda i, n: [3 + (7919 * i + 31 * j) % (vocabulary - 3) for j in n]
    inputs = [made(i, range(n)) for i, n in enumerate(lengths)]
    targets = [made(i + 1, range(self.targets)) for i in range(self.batch)]
    return inputs, targets


def model_flops(work: Work) -> tuple[float, float]:
  """FLOPs of a step's products with weights, and of attention's products.

  Of a T5 that computes keys and values and no padding, a multiplication and an
  addition for each entry of a product. With T = P + text, L targets, per layer:

    encoder, per position: 2 (4 E N D + 3 E F), and 4 T N D of attention
    decoder, per target: 2 (6 E N D + 3 E F), and 4 (L + T) N D of attention
    keys and values of the encoder's output, per position and layer: 4 E N D
    logits, per target: 2 E V

  Training adds the gradients of activations: as much again for products with
  weights, twice as much for attention. Greedy decoding computes what scoring
  does: each position of the targets once.
  """
  s = work.sizes
  joined = s['num_heads'] * s['head_dim']
  ends = 2 * 3 * s['emb_dim'] * s['mlp_dim']
  square = 2 * s['emb_dim'] * joined
  weights = attention = 0.0
  for text in work.lengths or [work.inputs] * work.batch:
    length, targets = work.prompt + text, work.targets
    encoder = s['num_encoder_layers'] * length
    decoder = s['num_decoder_layers'] * targets
    weights += encoder * (4 * square + ends) + decoder * (6 * square + ends)
    weights += s['num_decoder_layers'] * length * 2 * square
    weights += targets * 2 * s['emb_dim'] * s['vocab_size']
    attention += 4 * joined * (encoder * length + decoder * (targets + length))
  if work.kind == 'train':
    return 2 * weights, 3 * attention
  return weights, attention


@dataclasses.dataclass
class Step:
  """What an engine made.

  Attributes:
    run: does one step, and returns when it is done.
    loss: of its first step, where it trains.
    compile_s: seconds that were spent before a first step could run.
    temporaries_mb: what the compiler set apart for intermediate results.
  """

  run: Callable[[], Any]
  loss: float | None = None
  compile_s: float | None = None
  temporaries_mb: float | None = None


def memory_mb() -> float:
  """The most that this process, or its accelerator, has held."""
  for name in ('jax', 'torch'):
    module = sys.modules.get(name)
    if module is None:
      continue
    if name == 'torch' and module.cuda.is_available():
      return module.cuda.max_memory_allocated() / 1e6
    if name == 'jax' and module.default_backend() != 'cpu':
      return module.devices()[0].memory_stats()['peak_bytes_in_use'] / 1e6
  unit = 1e6 if sys.platform == 'darwin' else 1e3
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# What our engines and the minimal one have in common.


def draw_params(work: Work) -> Any:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from prompt_tuning.models import network

  config = network.T5Config(**work.sizes)
  rng = np.random.default_rng(0)

  def draw(path, like):
    fan_in = like.shape[0] if path[-1].key == 'kernel' else 1
    x = rng.standard_normal(like.shape, np.float32) * fan_in**-0.5
    if path[-1].key == 'scale':
      x = np.ones(like.shape)
    return jnp.asarray(x, work.dtype)

  return jax.tree_util.tree_map_with_path(
    draw, network.parameter_shapes(config)
  )


def batch_of(work: Work, first_id: int) -> dict[str, Any]:
  """The padded batch, with the virtual tokens in front."""
  import numpy as np

  inputs, targets = work.rows()
  virtual = list(range(first_id, first_id + work.prompt))
  length = work.prompt + work.inputs
  rows = [
    virtual + row + [0] * (length - work.prompt - len(row)) for row in inputs
  ]
  targets = np.asarray(targets, np.int32)
  return {
    'encoder_input_tokens': np.asarray(rows, np.int32),
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones(targets.shape, np.int32),
  }


def compiled(
  function: Callable, *args: Any, donate=()
) -> tuple[Callable, Step]:
  """The function, compiled for these arguments, and what that took."""
  import jax

  start = time.time()
  program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
  made = Step(lambda: None, compile_s=time.time() - start)
  analysis = program.memory_analysis()
  if analysis is not None:
    made.temporaries_mb = analysis.temp_size_in_bytes / 1e6
  return program, made


def greedy(work: Work, methods: tuple[Any, ...] = ()) -> Any:
  from prompt_tuning.models import decoding
  from prompt_tuning.models import network
  from prompt_tuning.models.model import EncoderDecoderModel

  return EncoderDecoderModel(
    network.T5Config(**work.sizes, dtype=work.dtype),
    decode_fn=decoding.temperature_sample,
    decoder_params={'temperature': 0.0},
    methods=methods,
  )


# Engines.


def ours(work: Work, *, trains_model: bool = False) -> Step:
  """This package; training as `train` does it where no setting is typed."""
  import jax.numpy as jnp
  import numpy as np

  from prompt_tuning.methods.model_tuning import ModelTuning
  from prompt_tuning.methods.prompt import Prompt

  prompt = Prompt(work.prompt)
  model = greedy(work, (prompt, ModelTuning()) if trains_model else (prompt,))
  params = draw_params(work)
  batch = batch_of(work, model.config.vocab_size)
  rng = np.random.default_rng(1)
  shape = (1, work.prompt, model.config.emb_dim)
  table = jnp.asarray(rng.uniform(-0.5, 0.5, shape), jnp.float32)
  variables = {'params': params, 'prompt': {'table': table}}
  if work.kind == 'train':
    return _training(work, model, variables, batch)
  name = {'score': 'score_batch', 'generate': 'predict_batch'}[work.kind]
  return _inference(work, getattr(model, name), variables, batch)


def _training(work: Work, model: Any, variables: Any, batch: Any) -> Step:
  """As `train` takes its steps: shapes, microbatches and all."""
  import itertools

  import jax
  import optax

  from prompt_tuning.training import batches
  from prompt_tuning.training import mesh_choice
  from prompt_tuning.training import partitioning
  from prompt_tuning.training import stepping
  from prompt_tuning.training.train_state import TrainState

  layout = partitioning.single_device()
  names = [method.collection for method in model.methods]
  frozen = {k: v for k, v in variables.items() if k not in names}
  tx = optax.adafactor(1e-3)
  state = TrainState.create({k: variables[k] for k in names}, tx)
  shardings = jax.tree.map(lambda x: layout.replicated, state)
  # Where the first step leaves it: another place would be another program.
  state = jax.device_put(state, shardings)
  frozen = jax.device_put(frozen, layout.replicated)
  sizes = {'inputs': work.inputs, 'targets': work.targets}
  workload = mesh_choice.Workload.of(
    model.config,
    model.methods,
    sizes,
    param_dtype=work.dtype,
    batch_size=work.batch,
    microbatches=work.microbatches,
  )
  parts = workload.parts(layout, mesh_choice.memory_of_job())
  record = types.SimpleNamespace(lengths=None)
  how = (layout, work.batch, work.microbatches, parts, None)
  _, shapes = stepping.sliced(itertools.repeat(batch), record, *how)
  placed = batches.placed(
    batch,
    layout,
    work.batch,
    model.config.vocab_size + work.prompt,
    shapes,
    model.token_weights,
  ).content
  step = (model, tx, 1e-3, jax.random.key(0), layout)
  if shapes is None:
    step = stepping.step_function(*step, parts, shardings)
  else:
    step = stepping.SlicedStep(*step, shardings)
  made = Step(lambda: None)
  if shapes is None:
    compiling = step.lower(state, frozen, placed)
    start = time.time()
    step = compiling.compile()
    made.compile_s = time.time() - start
    made.temporaries_mb = step.memory_analysis().temp_size_in_bytes / 1e6

  def run():
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, frozen, placed))
    return metrics

  start = time.time()
  made.run, made.loss = run, float(run()['loss'])
  if made.compile_s is None:
    made.compile_s = time.time() - start
  return made


def _inference(work: Work, function: Any, variables: Any, batch: Any) -> Step:
  """As an evaluation takes a batch, in slices of its own shapes."""
  import jax

  from prompt_tuning.training import slices

  ids = batch['encoder_input_tokens']
  longest = ids.shape[1]
  tokens = work.batch * longest if jax.default_backend() == 'cpu' else None
  shapes = slices.choose(
    [slices.row_lengths(ids)], longest, rows=work.batch, tokens=tokens
  )
  program = jax.jit(function)

  def run():
    return slices.run(shapes, batch, lambda part, _: program(variables, part))

  start = time.time()
  run()
  return Step(run, compile_s=time.time() - start)


def minimal(work: Work) -> Step:
  """A T5 and its step in the fewest lines of JAX, nothing tried to be fast."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from prompt_tuning.models import layers

  params, sizes = draw_params(work), work.sizes
  heads, size = sizes['num_heads'], sizes['head_dim']

  def norm(x, scale):
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return (x * jax.lax.rsqrt(mean + 1e-6)).astype(x.dtype) * scale['scale']

  def attend(p, x, y, bias):
    split = lambda x: x.reshape(*x.shape[:2], heads, size)
    query = split(x @ p['query']['kernel'])
    key, value = split(y @ p['key']['kernel']), split(y @ p['value']['kernel'])
    scores = jnp.einsum('bqnd,bsnd->bnqs', query, key).astype(jnp.float32)
    weights = jax.nn.softmax(scores + bias).astype(x.dtype)
    mixed = jnp.einsum('bnqs,bsnd->bqnd', weights, value)
    return mixed.reshape(*x.shape[:2], -1) @ p['out']['kernel']

  def ends(p, x):
    gate = jax.nn.gelu(x @ p['wi_0']['kernel']) * (x @ p['wi_1']['kernel'])
    return gate @ p['wo']['kernel']

  def bias_of(p, length, bidirectional):
    at = jnp.arange(length)
    buckets = layers.relative_position_bucket(
      at[None] - at[:, None],
      bidirectional=bidirectional,
      num_buckets=32,
      max_distance=128,
    )
    bias = p['relpos_bias']['rel_embedding'].astype(jnp.float32)[:, buckets]
    return (
      bias
      if bidirectional
      else bias + jnp.where(at[None] <= at[:, None], 0, -1e10)
    )

  def loss_fn(table, params, ids, before, targets):
    embedding = params['token_embedder']['embedding']
    rows = jnp.broadcast_to(table.astype(work.dtype), (len(ids), *table.shape))
    x = jnp.concatenate([rows, embedding[ids]], 1)
    valid = jnp.pad(ids > 0, ((0, 0), (len(table), 0)), constant_values=True)
    padding = jnp.where(valid, 0, -1e10)[:, None, None]
    encoder, decoder = params['encoder'], params['decoder']
    bias = bias_of(encoder, x.shape[1], True)[None] + padding
    for i in range(sizes['num_encoder_layers']):
      p = encoder[f'layers_{i}']
      y = norm(x, p['pre_attention_layer_norm'])
      x += attend(p['attention'], y, y, bias)
      x += ends(p['mlp'], norm(x, p['pre_mlp_layer_norm']))
    encoded = norm(x, encoder['encoder_norm'])
    x, bias = embedding[before], bias_of(decoder, before.shape[1], False)[None]
    for i in range(sizes['num_decoder_layers']):
      p = decoder[f'layers_{i}']
      y = norm(x, p['pre_self_attention_layer_norm'])
      x += attend(p['self_attention'], y, y, bias)
      y = norm(x, p['pre_cross_attention_layer_norm'])
      x += attend(p['encoder_decoder_attention'], y, encoded, padding)
      x += ends(p['mlp'], norm(x, p['pre_mlp_layer_norm']))
    x = norm(x, decoder['decoder_norm']).astype(jnp.float32)
    logits = x @ decoder['logits_dense']['kernel'].astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(log_z - chosen + 1e-4 * log_z**2)

  def step(table, *args):
    loss, gradient = jax.value_and_grad(loss_fn)(table, *args)
    return table - 1e-3 * gradient, loss

  batch = batch_of(work, 0)
  rng = np.random.default_rng(1)
  shape = (1, work.prompt, sizes['emb_dim'])
  table = jnp.asarray(rng.uniform(-0.5, 0.5, shape)[0], jnp.float32)
  ids = batch['encoder_input_tokens'][:, work.prompt :]
  args = (params, ids, batch['decoder_input_tokens'])
  args = (*args, batch['decoder_target_tokens'])
  program, made = compiled(step, table, *args, donate=0)

  def run():
    nonlocal table
    table, loss = jax.block_until_ready(program(table, *args))
    return loss

  made.run, made.loss = run, float(run())
  return made


def peft(work: Work, *, compiles: bool = False) -> Step:
  """Hugging Face's T5 in PyTorch with PEFT's prompt."""
  import peft as peft_lib
  import torch
  import transformers

  sizes = work.sizes
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  dtype = getattr(torch, work.dtype)
  torch.manual_seed(0)
  config = transformers.T5Config(
    vocab_size=sizes['vocab_size'],
    d_model=sizes['emb_dim'],
    d_kv=sizes['head_dim'],
    d_ff=sizes['mlp_dim'],
    num_layers=sizes['num_encoder_layers'],
    num_decoder_layers=sizes['num_decoder_layers'],
    num_heads=sizes['num_heads'],
    dropout_rate=0.0,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    decoder_start_token_id=0,
  )
  base = transformers.T5ForConditionalGeneration(config).to(device, dtype)
  model = peft_lib.get_peft_model(
    base,
    peft_lib.PromptTuningConfig(
      task_type='SEQ_2_SEQ_LM', num_virtual_tokens=work.prompt
    ),
  )
  inputs, targets = work.rows()
  longest = max(map(len, inputs))  # as its data collators pad
  ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs])
  batch = {
    'input_ids': ids.to(device),
    'attention_mask': (ids > 0).long().to(device),
    'labels': torch.tensor(targets).to(device),
  }
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  called = torch.compile(model) if compiles else model
  if work.kind == 'train':
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def run():
      loss = called(**batch).loss
      loss.backward()
      optimizer.step()
      optimizer.zero_grad()
      wait()
      return loss.item()

  elif work.kind == 'score':
    model.eval()

    @torch.inference_mode()
    def run():
      logits = called(**batch).logits.float()
      chosen = logits.log_softmax(-1).gather(2, batch['labels'][..., None])
      return chosen.sum((1, 2)).cpu()

  else:
    model.eval()
    del batch['labels']

    @torch.inference_mode()
    def run():
      return model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=work.targets,
        min_new_tokens=work.targets,
      ).cpu()

  start = time.time()
  found = run()
  loss = found if work.kind == 'train' else None
  return Step(run, loss, time.time() - start)


def jax_peak(work: Work) -> Step:
  """Products of two matrices as large as the step's, the best rate of them."""
  import jax
  import jax.numpy as jnp

  shapes = _product_shapes(work)
  pairs = [[jnp.ones(shape, work.dtype) for shape in (a, b)] for a, b in shapes]
  product = jax.jit(jnp.matmul)
  return _peak(
    [lambda p=p: jax.block_until_ready(product(*p)) for p in pairs], shapes
  )


def torch_peak(work: Work) -> Step:
  """As `jax_peak`, in PyTorch."""
  import torch

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  shapes = _product_shapes(work)
  dtype = getattr(torch, work.dtype)
  pairs = [
    [torch.ones(shape, dtype=dtype, device=device) for shape in pair]
    for pair in shapes
  ]
  return _peak([lambda p=p: (p[0] @ p[1], wait()) for p in pairs], shapes)


def _product_shapes(work: Work) -> list[tuple[tuple[int, ...], ...]]:
  """Matrices: square, and the largest of a layer; then attention's, batched."""
  sizes = work.sizes
  length = work.prompt + work.inputs
  batched = (work.batch, sizes['num_heads'])
  embed, hidden, size = (sizes[n] for n in ('emb_dim', 'mlp_dim', 'head_dim'))
  return [
    ((2048, 2048), (2048, 2048)),
    ((work.batch * length, embed), (embed, hidden)),
    ((work.batch * length, hidden), (hidden, embed)),
    ((*batched, length, size), (*batched, size, length)),
    ((*batched, length, length), (*batched, length, size)),
  ]


def _peak(products: list[Callable], shapes: Any) -> Step:
  """A step is each product, several times; it returns the rates, FLOP/s."""
  import math

  def rate(product, a, b):
    best = math.inf
    for _ in range(5):
      start = time.perf_counter()
      product()
      best = min(best, time.perf_counter() - start)
    return 2 * math.prod(a) * b[-1] / best

  for product in products:
    product()

  def run():
    rates = [rate(p, *pair) for p, pair in zip(products, shapes)]
    return {'products': max(rates[:3]), 'batched': max(rates[3:])}

  return Step(run)


@dataclasses.dataclass(frozen=True)
class Engine:
  """A way to do the work.

  Attributes:
    make: see the module.
    needs: modules without which it is not installed.
    works: of WORKS, which it does.
    is_peak: its steps tell rates of products, which others are held against.
  """

  make: Callable[[Work], Step]
  needs: tuple[str, ...]
  works: tuple[str, ...] = WORKS
  is_peak: bool = False


JAX, TORCH = ('jax', 'prompt_tuning'), ('torch', 'transformers', 'peft')
ENGINES = {
  'ours': Engine(ours, JAX),
  'ours_model_tuning': Engine(
    functools.partial(ours, trains_model=True), JAX, ('train',)
  ),
  'minimal_jax': Engine(minimal, JAX, ('train',)),
  'peft': Engine(peft, TORCH),
  'peft_compiled': Engine(
    functools.partial(peft, compiles=True), TORCH, ('train', 'score')
  ),
  'jax_peak': Engine(jax_peak, ('jax',), is_peak=True),
  'torch_peak': Engine(torch_peak, ('torch',), is_peak=True),
}
