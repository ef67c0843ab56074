"""Where and how things run: devices, processes, prefetching, journals, durable files."""
