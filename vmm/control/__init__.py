"""QMP commands and events: thin handlers between library and machine, one file for each schema file.

`wiring.build_control` puts them together; `human` is the line-oriented monitor.
"""
