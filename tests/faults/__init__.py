"""Faults: kills, failing disks and changing sources at every system call of every command. `make faults`."""
