"""The machine: files, processes, memory, time, logs."""
