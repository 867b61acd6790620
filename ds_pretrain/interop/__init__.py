"""Weights from and for `transformers`: what families of models there are, their folders, the way in and the way out."""

from ds_pretrain.interop import bert, electra, gpt2, llama  # noqa: F401 (they register their families)
