"""What `keel` does besides training, one file each; `grpo.cli` is the front door to them."""
