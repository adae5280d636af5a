"""A policy's layers as training runs them: packed rows in, log-probabilities over supports out.

- `attention`: packed rows, each sequence by itself; `flash` its kernels on a GPU
- `experts`: tokens sorted by expert once, grouped matrix products; `grouped` their weights' gradients on a GPU
- `decoder`: whole decoder layers in few kernels on a GPU; `pointwise` what lies between their products
- `head`: log-probabilities over the sampled tokens' supports in the place of logits
"""
