"""One list of layers for every model: GPT-2, LLaMA and BERT styles are fields of `ModelConfig`."""
