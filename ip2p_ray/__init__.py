"""InstructPix2Pix on Ray: from captions to an editor that changes a picture as a sentence says.

captions --> triplets --> candidates --> pairs --> latents --> checkpoints --> editor --> service
   |            |             |            |                                     |
   |            |             |            '-- scores: every candidate's four    '-- evaluation
   |            |             |                similarities, rejected ones too
   |            |             '-- two images of one noise, made by Prompt-to-Prompt, judged by CLIP
   |            '-- (caption, instruction, edited caption), written by a language model
   '-- text only

Each arrow up to the editor is a module here (the algorithm, without Ray) and a module in `stages/`
(the same on Ray); the nouns up to latents are datasets in `schema`. `jobs/quickstart.py` runs all
of these arrows on the miniature's models, and `jobs/edit.py` edits a picture. A command for each
arrow, and the service, come later. This module imports nothing.
"""

__version__ = "0.1.0"
