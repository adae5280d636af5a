"""The stability fixes of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1), one file each: formula, paper, code.

`unbiased_kl` and `sequence_mask` are pure functions of tensors with one call site in the loss; `keep_sampling_mask`
computes log-probabilities over the supports that sampling really used; `keep_routing` forces the experts that
generation used.
"""
