"""Boot images: files to bytes in guest RAM and the CPU's first state."""
