"""The page path beside stock QEMU 7.2: jobs, goals, table, picture (`python -m tools.bench`)."""
