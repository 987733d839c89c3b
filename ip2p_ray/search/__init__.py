"""The search for a triplet's pairs: what makes fewer candidates, or cheaper ones, and when.

options    which of it is on; all of it is off by default
rules      when to stop, to give up, to prune: plain numbers in, a probability or a yes out
triplet    what is still to be made of one triplet, and what came of it
schedule   full batches from many triplets; knows no tensors
generator  the tensors, and `search`, which is what a caller wants
fitting    priors and margins, read off pilot triplets
"""
