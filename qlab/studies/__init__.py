"""The scripts that make the files that ship with `qlab.samples`, and the loaders of their tables."""
