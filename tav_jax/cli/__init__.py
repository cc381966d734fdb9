"""The command `tav`: a parser, and one module for each command."""
