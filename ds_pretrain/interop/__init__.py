"""Weights from elsewhere: other libraries' names and layouts, in the logical names that every layout here shares."""
