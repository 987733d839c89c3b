"""InstructPix2Pix on Ray: from captions to an editor that changes a picture as a sentence says.

captions --> triplets --> candidates --> pairs --> latents --> checkpoints --> editor --> service
   |            |             |            |                                     |
   |            |             |            '-- scores: every candidate's four    '-- evaluation
   |            |             |                similarities, rejected ones too
   |            |             '-- two images of one noise, made by Prompt-to-Prompt, judged by CLIP
   |            '-- (caption, instruction, edited caption), written by a language model
   '-- text only

Each arrow is a module here (the algorithm, without Ray), a module in `stages/` (the same on Ray)
and a command in `jobs/`; each noun is a dataset in `schema`. This module imports nothing.
"""

__version__ = "0.1.0"
