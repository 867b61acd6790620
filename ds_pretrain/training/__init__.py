"""The step, the run and what survives it: both DeepSpeed engines behind one `Engine`."""
