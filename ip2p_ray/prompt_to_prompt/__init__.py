"""Prompt-to-Prompt: pictures of two captions that share their structure, without attention maps."""
