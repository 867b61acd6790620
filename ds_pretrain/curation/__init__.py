"""From sources to documents worth training on."""
