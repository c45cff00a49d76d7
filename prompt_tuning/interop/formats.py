"""The names of formats that are written, and of maps to another model.

See `conversion` and, for the maps, `transfer`.
"""

from typing import Literal, get_args

MODEL_FORMATS = ('safetensors', 't5x', 'hugging_face', 'prompt_tokens')
PROMPT_FORMATS = ('numpy', 'peft', 'serving_table', 'recycled')
Map = Literal['linear', 'lin_comb', 'mlp']
MAPS = get_args(Map)
