"""How much smaller an upload of LoRA adapters is than one of the model: `python -m bench.lora`, the table in docs/levers.md.

Counted from the presets' own tensors, on the meta device: nothing is trained and nothing is timed.
"""

from __future__ import annotations

from cosilo_common.diffusion.adapters import adapter_table
from cosilo_common.diffusion.lora import Lora, file_bytes
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.parts import split_of
from cosilo_common.diffusion.presets import preset

WORD_BYTES = 4  # of a value in a sum at b = 32
RANKS = (4, 8, 16)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"tun2023": (("first", "second"),), "fashion-16": (ATTENTION, (*ATTENTION, "conv1", "conv2"))}


def rows() -> list[str]:
    """The table's lines, as Markdown."""
    lines = [
        "| preset | adapters beside | r | upload | of the model's | with `freeze_a` | download, each round |",
        "| --- | --- | ---: " + "| ---: " * 4 + "|",
    ]
    for name, choices in TARGETS.items():
        architecture = preset(name).architecture
        whole = tensor_table(architecture)
        lines.append(f"| `{name}` | (the whole model) | | {_mb(WORD_BYTES * whole.size)} | 100 % | | {_mb(file_bytes(whole))} |")
        for targets in choices:
            for rank in RANKS:
                terms = Lora(base="0" * 64, base_bytes=file_bytes(whole), rank=rank, targets=targets, freeze_a=True)
                table = adapter_table(architecture, terms)
                frozen = split_of(table, architecture, (), lora=terms).shared_table
                lines.append(
                    f"| `{name}` | {', '.join(f'`{target}`' for target in targets)} | {rank} | {_mb(WORD_BYTES * table.size)} "
                    f"| {100 * table.size / whole.size:.1f} % | {_mb(WORD_BYTES * frozen.size)} | {_mb(file_bytes(table))} |"
                )
    return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    print("\n".join(rows()))
