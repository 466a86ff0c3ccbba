"""This machine: files, processes, memory, time, logs."""
