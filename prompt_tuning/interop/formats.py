"""The formats that models and prompts are written in (see `conversion`)."""

MODEL_FORMATS = ('safetensors', 't5x', 'hugging_face', 'prompt_tokens')
PROMPT_FORMATS = ('numpy', 'peft', 'serving_table', 'recycled')
