"""Errors, files and the command line: what every part of this package stands on."""
