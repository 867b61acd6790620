"""What a process ends with, for launchers and batch scripts: 0 is done or stopped with a checkpoint, 128 + N signal N."""

MISTAKE = 2
"""In the run, its data or the command: it comes again."""
DIVERGED = 3
"""The loss is not a number."""
FAILED = 74
"""A file or a connection failed (EX_IOERR of sysexits.h): a full disk, a node that did not come."""
BUSY = 75
"""Another process trains into the output (EX_TEMPFAIL)."""
HUNG = 76
"""A rank made no step for too long."""
