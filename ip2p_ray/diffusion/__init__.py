"""Stable Diffusion as functions: noise schedule, model, samplers, guidance."""
