r"""Triplets: a language model reads a caption and writes an instruction and the edited caption.

caption --prompt--> "caption\n##\n" --a writer--> reply --reply.parse_reply--> Triplet or a reason
"""
