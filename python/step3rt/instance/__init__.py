"""The two kinds of instance process: attention and FFN."""
