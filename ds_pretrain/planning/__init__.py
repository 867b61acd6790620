"""What a run will take, by arithmetic alone: what ranks hold, what they send, how long a step is."""
