"""Value types that every room shares. Torch and numpy only; nothing here knows a process group, a file or a model."""
