"""A checkpoint of our own trainer: a folder with model.safetensors and config.json."""
