"""Many samples into files, in pieces, by any number of processes."""
