"""Dynamic memory sparsification (arXiv 2506.05345) of our own, for any model of four architectures.

`evict` says which tokens go, `cache` keeps the others and gives the bytes of the rest back, `prefill` and `ragged` are
the attention over what is kept, and `method` is how a run asks for all of it.

A retrofit: `corpus` is what is read, `soft` the attention under evictions still to be learned, `student` the model and
its original, `train` the loop, `judge` how near they are, `artefact` what is left in the end, and `run` ties them to
files.
"""
