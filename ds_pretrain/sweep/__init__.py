"""Many runs from one file: their settings (`spec`), running them (`cells`), what came of them (`results`), the commands."""
