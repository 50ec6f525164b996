"""Dynamic memory sparsification (arXiv 2506.05345) of our own, for any model of four architectures.

`evict` says which tokens go, `cache` keeps the others and gives the bytes of the rest back, `prefill` and `ragged` are
the attention over what is kept, and `method` is how a run asks for all of it.
"""
