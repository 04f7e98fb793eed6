"""The round machine: what a round is and how it moves. Pure: no I/O, no clock, no randomness, no library but the standard one."""
