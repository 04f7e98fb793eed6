"""The diffusion model both sides agree on: its plain description, and (in modules of their own, which import torch)
what is built from it.

`specification`, `presets` and `seeding` import no torch, so that daemons and the command line may use them.
"""
