"""What a dataset and an editor will take: device hours, bytes, objects, money and time.

`arithmetic` reckons them from a Workload, Speeds, Sizes, Prices and a Cluster (`config`), without
Ray and without models. Speeds are read off a finished run (`measured`) or reckoned from public
figures of a device (`devices`). `sensitivity` says what would change it most, `comparison` how far
it was from a run that was made, `text` tells it.
"""
