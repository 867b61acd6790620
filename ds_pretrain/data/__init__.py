"""From sources to rows of tokens. Import the file you need: nothing heavy is imported here."""
