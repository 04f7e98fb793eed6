"""The diffusion model both sides agree on: its plain description, and (in modules of their own, which import torch)
what is built from it.

`specification`, `presets` and `seeding` import no torch, so that daemons and the command line may use them.
"""

from cosilo_common.diffusion.deferral import defer_networks

defer_networks()  # here, for every module that imports diffusers is one of this package's or imports one
