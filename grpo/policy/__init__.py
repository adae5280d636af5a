"""The policy as training runs it: a transformers model that reads packed rows, checked at start, sharded over ranks."""
