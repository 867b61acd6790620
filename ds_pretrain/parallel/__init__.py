"""Processes, groups and sharded tensors: megatron-core as a library, on GPU and on CPU."""
