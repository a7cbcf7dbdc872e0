"""The terminal output of a study: the live table, `status`, the table of a replay."""
