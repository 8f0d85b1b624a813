"""The command line, thin: parse, build, call, save. The programs without suffix are for contributors."""
