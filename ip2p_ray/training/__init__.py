"""Training of the editor: what one optimizer step is, and nothing of where it runs.

unet (wider input) -> feed (which sample, which noise) -> dropout -> loss -> ema, and loop joins
them into a generator of metrics. No module here knows Ray.
"""
